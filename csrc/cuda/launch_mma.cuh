// Chooses the instantiation of the tensor-core kernel. Included by one .cu file per type.
#pragma once

#include "attention_mma.cuh"

namespace nld {

template <typename T, int kHead, int kWarps>
int launch_mma_shape(const AttentionParams& params, const LaunchPlan& plan, cudaStream_t stream) {
    return launch(attention_mma<T, kHead, kWarps>, plan.m_tiles, plan.kv_heads * plan.splits, plan.rows,
                  MmaShape<kHead, kWarps>::kThreads, plan.shared_bytes, stream, params);
}

template <typename T, int kHead>
int launch_mma_head(const AttentionParams& params, const LaunchPlan& plan, cudaStream_t stream) {
    if (plan.m_tile == MmaShape<kHead, 8>::kM) return launch_mma_shape<T, kHead, 8>(params, plan, stream);
    return launch_mma_shape<T, kHead, 4>(params, plan, stream);
}

template <typename T>
int launch_mma(const AttentionParams& params, const LaunchPlan& plan, cudaStream_t stream) {
    switch (plan.padded_head) {
        case 32:
            return launch_mma_head<T, 32>(params, plan, stream);
        case 64:
            return launch_mma_head<T, 64>(params, plan, stream);
        case 96:
            return launch_mma_head<T, 96>(params, plan, stream);
        case 128:
            return launch_mma_head<T, 128>(params, plan, stream);
        case 192:
            return launch_mma_head<T, 192>(params, plan, stream);
        default:
            return launch_mma_head<T, 256>(params, plan, stream);
    }
}

}  // namespace nld
