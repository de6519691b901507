// The launcher of block_attention.
#include <initializer_list>

#include "attention_merge.cuh"
#include "attention_plan.h"

namespace nld {

namespace {

struct Prepared {
    LaunchPlan plan;
    size_t workspace_bytes;
};

int prepare(const NldBlockAttention* call, Prepared* prepared) {
    if (call == nullptr) return NLD_NULL_POINTER;
    int status = check_shapes(*call);
    if (status != NLD_OK) return status;
    DeviceLimits limits;
    status = device_limits(&limits);
    if (status != NLD_OK) return status;
    prepared->plan = launch_plan(*call, limits.processors, limits.shared_bytes);
    if (prepared->plan.shared_bytes > limits.shared_bytes) return NLD_SHARED_MEMORY;
    prepared->workspace_bytes = static_cast<size_t>(call_workspace(*call, prepared->plan).floats()) * sizeof(float);
    return NLD_OK;
}

int check_pointers(const NldBlockAttention& call, size_t workspace_bytes) {
    for (const void* pointer : {call.query, call.key, call.value, static_cast<const void*>(call.output),
                                static_cast<const void*>(call.prefix_lens), static_cast<const void*>(call.block_starts),
                                static_cast<const void*>(call.mask_kinds)})
        if (pointer == nullptr) return NLD_NULL_POINTER;
    if (call.max_prefix > 0 &&
        (call.key_pages == nullptr || call.value_pages == nullptr || call.block_table == nullptr))
        return NLD_NULL_POINTER;
    if (workspace_bytes == 0) return NLD_OK;
    if (call.workspace_bytes < workspace_bytes) return NLD_SMALL_WORKSPACE;
    return call.workspace == nullptr ? NLD_NULL_POINTER : NLD_OK;
}

int launch_attention(const AttentionParams& params, const LaunchPlan& plan, int type, cudaStream_t stream) {
    if (type == NLD_FLOAT32) return launch_fma(params, plan, stream);
    if (type == NLD_BFLOAT16) return launch_mma<BFloat16>(params, plan, stream);
    return launch_mma<Float16>(params, plan, stream);
}

template <typename T>
int launch_merge_type(const AttentionParams& params, const LaunchPlan& plan, cudaStream_t stream) {
    return launch(attention_merge<T>, ceil_div(params.workspace.queries, kMergeWarps), plan.kv_heads, plan.rows,
                  32 * kMergeWarps, 0, stream, params);
}

}  // namespace

int launch_merge(const AttentionParams& params, const LaunchPlan& plan, int type, cudaStream_t stream) {
    if (type == NLD_FLOAT32) return launch_merge_type<float>(params, plan, stream);
    if (type == NLD_BFLOAT16) return launch_merge_type<BFloat16>(params, plan, stream);
    return launch_merge_type<Float16>(params, plan, stream);
}

}  // namespace nld

int nld_block_attention_workspace(const NldBlockAttention* call, size_t* bytes) {
    nld::Prepared prepared;
    const int status = nld::prepare(call, &prepared);
    if (status != NLD_OK) return status;
    if (bytes == nullptr) return NLD_NULL_POINTER;
    *bytes = prepared.workspace_bytes;
    return NLD_OK;
}

int nld_block_attention(const NldBlockAttention* call, cudaStream_t stream) {
    nld::Prepared prepared;
    int status = nld::prepare(call, &prepared);
    if (status != NLD_OK) return status;
    if (call->rows == 0 || call->max_length == 0) return NLD_OK;
    status = nld::check_pointers(*call, prepared.workspace_bytes);
    if (status != NLD_OK) return status;
    const nld::LaunchPlan& plan = prepared.plan;
    const nld::AttentionParams params = nld::attention_params(*call, plan);
    status = nld::launch_attention(params, plan, call->type, stream);
    if (status != NLD_OK || plan.splits == 1) return status;
    return nld::launch_merge(params, plan, call->type, stream);
}
