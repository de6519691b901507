#include "attention_fma.cuh"

namespace nld {

namespace {

template <int kHead>
int launch_fma_head(const AttentionParams& params, const LaunchPlan& plan, cudaStream_t stream) {
    return launch(attention_fma<kHead>, plan.m_tiles, plan.kv_heads * plan.splits, plan.rows, FmaShape<kHead>::kThreads,
                  plan.shared_bytes, stream, params);
}

}  // namespace

int launch_fma(const AttentionParams& params, const LaunchPlan& plan, cudaStream_t stream) {
    switch (plan.padded_head) {
        case 32:
            return launch_fma_head<32>(params, plan, stream);
        case 64:
            return launch_fma_head<64>(params, plan, stream);
        case 96:
            return launch_fma_head<96>(params, plan, stream);
        case 128:
            return launch_fma_head<128>(params, plan, stream);
        case 192:
            return launch_fma_head<192>(params, plan, stream);
        default:
            return launch_fma_head<256>(params, plan, stream);
    }
}

}  // namespace nld
