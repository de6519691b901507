// From a caller's request to checked kernel parameters and a launch plan: host only, no CUDA call.
#pragma once

#include "attention_params.h"
#include "smem.h"

namespace nld {

inline int type_bytes(int type) {
    return type == NLD_FLOAT32 ? 4 : type == NLD_BFLOAT16 || type == NLD_FLOAT16 ? 2 : 1;
}
inline bool is_float8(int type) { return type == NLD_FLOAT8_E4M3 || type == NLD_FLOAT8_E5M2; }

template <int kHead>
int mma_shared_bytes(int m_tile) {
    return m_tile == 64 ? MmaShape<kHead, 4>::kSharedBytes : MmaShape<kHead, 8>::kSharedBytes;
}

inline int shared_bytes(bool mma, int padded_head, int m_tile) {
    switch (padded_head) {
        case 32:
            return mma ? mma_shared_bytes<32>(m_tile) : FmaShape<32>::kSharedBytes;
        case 64:
            return mma ? mma_shared_bytes<64>(m_tile) : FmaShape<64>::kSharedBytes;
        case 96:
            return mma ? mma_shared_bytes<96>(m_tile) : FmaShape<96>::kSharedBytes;
        case 128:
            return mma ? mma_shared_bytes<128>(m_tile) : FmaShape<128>::kSharedBytes;
        case 192:
            return mma ? mma_shared_bytes<192>(m_tile) : FmaShape<192>::kSharedBytes;
        default:
            return mma ? mma_shared_bytes<256>(m_tile) : FmaShape<256>::kSharedBytes;
    }
}

inline int check_shapes(const NldBlockAttention& call) {
    if (call.type != NLD_FLOAT32 && call.type != NLD_BFLOAT16 && call.type != NLD_FLOAT16) return NLD_BAD_TYPE;
    if (call.cache_type != call.type && !is_float8(call.cache_type)) return NLD_BAD_TYPE;
    if (call.head_size < 32 || call.head_size > 256 || call.head_size % 16 != 0) return NLD_BAD_SHAPE;
    if (call.kv_heads < 1 || call.heads < 1 || call.heads % call.kv_heads != 0) return NLD_BAD_SHAPE;
    if (call.rows < 0 || call.max_length < 0 || call.max_prefix < 0 || call.page_size < 1) return NLD_BAD_SHAPE;
    if (call.split_limit < 0) return NLD_BAD_SHAPE;
    if (static_cast<int64_t>(call.max_length) * (call.heads / call.kv_heads) > (1 << 30)) return NLD_BAD_SHAPE;
    if (call.rows > 65535 || static_cast<int64_t>(call.kv_heads) * kMostSplits > 65535) return NLD_TOO_MANY;
    return NLD_OK;
}

// Of a call with checked shapes.
inline LaunchPlan launch_plan(const NldBlockAttention& call, int processors, int shared_limit) {
    const bool mma = call.type != NLD_FLOAT32;
    const int queries = call.heads / call.kv_heads * call.max_length;
    LaunchPlan plan;
    plan.rows = call.rows;
    plan.kv_heads = call.kv_heads;
    plan.padded_head = padded_head_size(call.head_size);
    plan.m_tile = !mma ? FmaShape<32>::kM : queries <= 64 ? 64 : 128;
    if (mma && shared_bytes(mma, plan.padded_head, plan.m_tile) > shared_limit) plan.m_tile = 64;
    plan.m_tiles = ceil_div(queries, plan.m_tile);
    plan.splits = choose_splits(call.rows, call.kv_heads, plan.m_tiles, call.max_prefix, processors, call.split_limit);
    plan.shared_bytes = shared_bytes(mma, plan.padded_head, plan.m_tile);
    return plan;
}

inline Workspace call_workspace(const NldBlockAttention& call, const LaunchPlan& plan) {
    const int queries = call.heads / call.kv_heads * call.max_length;
    return workspace(call.rows, call.kv_heads, plan.splits, queries, call.head_size);
}

inline bool aligned(const void* pointer, const int64_t* strides, int count, int64_t element_bytes, uintptr_t bytes) {
    uintptr_t bits = reinterpret_cast<uintptr_t>(pointer);
    for (int i = 0; i < count; ++i) bits |= static_cast<uintptr_t>(strides[i] * element_bytes);
    return bits % bytes == 0;
}

inline TokenView token_view(const void* base, const int64_t (&strides)[2], int type) {
    const int64_t bytes = type_bytes(type);
    const LoadPath path = aligned(base, strides, 2, bytes, 16) ? kLoadAsync : kLoadScalar;
    return {static_cast<const char*>(base), strides[0] * bytes, strides[1] * bytes, path};
}

inline PageView page_view(const void* base, const int64_t (&strides)[4], int cache_type, int type) {
    const int64_t bytes = type_bytes(cache_type);
    LoadPath path = kLoadScalar;
    if (strides[3] == 1) {
        const uintptr_t chunk = is_float8(cache_type) ? 16 / static_cast<uintptr_t>(type_bytes(type)) : 16;
        if (aligned(base, strides, 3, bytes, chunk)) path = is_float8(cache_type) ? kLoadFloat8 : kLoadAsync;
    }
    return {static_cast<const char*>(base),
            strides[0] * bytes,
            strides[1] * bytes,
            strides[2] * bytes,
            strides[3] * bytes,
            path};
}

inline AttentionParams attention_params(const NldBlockAttention& call, const LaunchPlan& plan) {
    constexpr float kLog2E = 1.4426950408889634f;
    AttentionParams params;
    params.query = token_view(call.query, call.query_strides, call.type);
    params.key = token_view(call.key, call.key_strides, call.type);
    params.value = token_view(call.value, call.value_strides, call.type);
    params.key_pages = page_view(call.key_pages, call.key_page_strides, call.cache_type, call.type);
    params.value_pages = page_view(call.value_pages, call.value_page_strides, call.cache_type, call.type);
    params.output = static_cast<char*>(call.output);
    params.output_token = call.output_strides[0];
    params.output_head = call.output_strides[1];
    params.output_pairs = aligned(call.output, call.output_strides, 2, type_bytes(call.type), 4);
    params.block_table = call.block_table;
    params.block_table_stride = call.block_table_stride;
    params.prefix_lens = call.prefix_lens;
    params.block_starts = call.block_starts;
    params.mask_kinds = call.mask_kinds;
    params.group = call.heads / call.kv_heads;
    params.head_size = call.head_size;
    params.page_size = call.page_size;
    params.page_shift = page_shift(call.page_size);
    params.cache_type = call.cache_type;
    params.fresh_scale = call.scale * kLog2E;
    const bool float8 = is_float8(call.cache_type);
    const bool by_head = float8 && call.k_scales != nullptr && call.v_scales != nullptr;
    params.prefix_scale = params.fresh_scale * (float8 && !by_head ? call.k_scale : 1.0f);
    params.v_scale = float8 && !by_head ? call.v_scale : 1.0f;
    params.k_scales = by_head ? call.k_scales : nullptr;
    params.v_scales = by_head ? call.v_scales : nullptr;
    params.k_scales_stride = call.k_scales_stride;
    params.v_scales_stride = call.v_scales_stride;
    params.splits = plan.splits;
    params.workspace = call_workspace(call, plan);
    params.partials = plan.splits > 1 ? static_cast<float*>(call.workspace) : nullptr;
    return params;
}

}  // namespace nld
