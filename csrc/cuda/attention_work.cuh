// The work of a CTA of either attention kernel, and where its results go.
#pragma once

#include "attention_params.h"
#include "platform.cuh"

namespace nld {

struct Work {
    int row;
    int kv_head;
    int split;
    int start;        // the row's first fresh token
    int length;       // the row's fresh tokens
    int first_query;  // folded
    int queries;      // of the row, folded
    int mask_kind;
    float prefix_scale;  // of scores with cached keys, for base 2
    float v_scale;       // of cached values
    TileList tiles;

    NLD_DEVICE bool any() const { return first_query < queries; }
};

template <int kM, int kN>
NLD_DEVICE Work find_work(const AttentionParams& params) {
    Work work;
    work.row = block_z();
    work.kv_head = block_y() / params.splits;
    work.split = block_y() % params.splits;
    work.start = params.block_starts[work.row];
    work.length = params.block_starts[work.row + 1] - work.start;
    work.first_query = block_x() * kM;
    work.queries = work.length * params.group;
    work.mask_kind = params.mask_kinds[work.row];
    work.prefix_scale = params.prefix_scale;
    work.v_scale = params.v_scale;
    if (params.k_scales != nullptr) {
        work.prefix_scale *= params.k_scales[work.kv_head * params.k_scales_stride];
        work.v_scale *= params.v_scales[work.kv_head * params.v_scales_stride];
    }
    const int last_token = (least(work.first_query + kM, work.queries) - 1) / params.group;
    const int fresh = fresh_end(work.mask_kind, work.length, last_token);
    work.tiles = tile_list(params.prefix_lens[work.row], fresh, kN, work.split, params.splits);
    return work;
}

// Whether some of the tile's keys are hidden from some of the CTA's queries.
template <int kN>
NLD_DEVICE bool needs_mask(const Work& work, const Tile& tile) {
    return tile.first + kN > tile.end || (tile.fresh && work.mask_kind != kMaskAll);
}

// Where a folded query's results go.
struct Destination {
    int64_t output;  // elements
    int64_t entry;   // of the workspace
};
NLD_DEVICE Destination destination(const AttentionParams& params, const Work& work, int query) {
    const FoldedQuery folded = unfold(query, params.group);
    const int head = work.kv_head * params.group + folded.member;
    return {(work.start + folded.token) * params.output_token + head * params.output_head,
            params.workspace.entry(work.row, work.kv_head, work.split, query)};
}

// 1 / sum; 0 for a query that saw nothing.
NLD_DEVICE float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

}  // namespace nld
