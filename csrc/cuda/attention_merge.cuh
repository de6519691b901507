// Combines the splits of a prefix: one warp per folded query.
#pragma once

#include "attention_params.h"
#include "platform.cuh"

namespace nld {

constexpr int kMergeWarps = 4;
constexpr int kMergeColumns = 8;  // of 32 lanes: head sizes up to 256

// The largest score of all splits.
NLD_HOST_DEVICE float merged_maximum(const float* partials, const Workspace& workspace, int64_t first_entry) {
    float result = minus_infinity();
    for (int split = 0; split < workspace.splits; ++split) {
        const float maximum = partials[workspace.statistics(first_entry + split * workspace.queries)];
        result = result < maximum ? maximum : result;
    }
    return result;
}

template <typename T>
NLD_KERNEL(32 * kMergeWarps)
attention_merge(const NLD_GRID_CONSTANT AttentionParams params) {
    const int lane = thread_index() % 32, row = block_z(), kv_head = block_y();
    const int query = block_x() * kMergeWarps + thread_index() / 32;
    const int start = params.block_starts[row];
    if (query >= (params.block_starts[row + 1] - start) * params.group) return;
    const Workspace& workspace = params.workspace;
    const int64_t entry = workspace.entry(row, kv_head, 0, query);
    const float base = softmax_base(merged_maximum(params.partials, workspace, entry));

    float sum = 0.0f, sums[kMergeColumns] = {};
    for (int split = 0; split < workspace.splits; ++split) {
        const int64_t place = entry + static_cast<int64_t>(split) * workspace.queries;
        const float* statistics = params.partials + workspace.statistics(place);
        if (statistics[1] == 0.0f) continue;  // saw no keys and wrote no sums
        const float weight = exp2_fast(statistics[0] - base);
        sum += weight * statistics[1];
#pragma unroll
        for (int i = 0; i < kMergeColumns; ++i) {
            const int column = lane + 32 * i;
            if (column < workspace.head_size) sums[i] += weight * params.partials[workspace.sums(place) + column];
        }
    }

    const FoldedQuery folded = unfold(query, params.group);
    T* output = reinterpret_cast<T*>(params.output) + (start + folded.token) * params.output_token +
                (kv_head * params.group + folded.member) * params.output_head;
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < kMergeColumns; ++i) {
        const int column = lane + 32 * i;
        if (column < workspace.head_size) output[column] = from_float<T>(sums[i] * factor);
    }
}

}  // namespace nld
