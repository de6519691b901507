// Which CTA computes what: tiles, splits of the prefix, masks and the workspace, as functions of plain numbers.
//
// Shared by the kernels, the launcher and the host tests (tests/kernels/cuda_host).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "scalars.h"

namespace nld {

NLD_HOST_DEVICE int least(int a, int b) { return a < b ? a : b; }
NLD_HOST_DEVICE int most(int a, int b) { return a > b ? a : b; }
NLD_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Queries of one row and one KV head are folded into one dimension, with all heads of a token side by side.

struct FoldedQuery {
    int token;   // within the row's block
    int member;  // head within the KV head's group
};
NLD_HOST_DEVICE FoldedQuery unfold(int query, int group) { return {query / group, query % group}; }

// Pages.

struct PageSlot {
    int column;  // of the block table
    int slot;
};
// `shift` is log2(page_size), or -1 when page_size is no power of two.
NLD_HOST_DEVICE PageSlot page_slot(int token, int page_size, int shift) {
    if (shift >= 0) return {token >> shift, token & (page_size - 1)};
    return {token / page_size, token % page_size};
}
inline int page_shift(int page_size) {
    int shift = 0;
    while ((1 << shift) < page_size) ++shift;
    return (1 << shift) == page_size ? shift : -1;
}

// Masks of the fresh block.

enum MaskKind { kMaskAll = 0, kMaskCausal = 1 };

// Fresh tokens that any query up to `last_token` of the block may see.
NLD_HOST_DEVICE int fresh_end(int kind, int length, int last_token) {
    return kind == kMaskCausal ? least(length, last_token + 1) : length;
}
// Whether the query at `query_token` sees the fresh token `key_token`.
NLD_HOST_DEVICE bool sees(int kind, int query_token, int key_token) {
    return kind == kMaskAll || key_token <= query_token;
}

// Tiles of keys: those of the prefix first, then those of the fresh block. No tile mixes the two.

struct Tile {
    bool fresh;
    int first;  // token within the prefix or the block
    int end;    // tokens from here on do not exist
};

struct TileList {
    int first_tile;  // of the prefix
    int prefix_tiles;
    int fresh_tiles;
    int prefix;
    int fresh;

    NLD_HOST_DEVICE int count() const { return prefix_tiles + fresh_tiles; }
    NLD_HOST_DEVICE Tile at(int index, int size) const {
        if (index < prefix_tiles) return {false, (first_tile + index) * size, prefix};
        return {true, (index - prefix_tiles) * size, fresh};
    }
};

// Tiles of one split. The prefix is split by whole tiles; the fresh block belongs to the last split.
NLD_HOST_DEVICE TileList tile_list(int prefix, int fresh, int size, int split, int splits) {
    const int64_t tiles = ceil_div(prefix, size);
    const int first = static_cast<int>(tiles * split / splits);
    const int end = static_cast<int>(tiles * (split + 1) / splits);
    return {first, end - first, split == splits - 1 ? ceil_div(fresh, size) : 0, prefix, fresh};
}

// The workspace of split prefixes: for every (row, KV head, split, folded query) D sums, then all (maximum, sum) pairs.

struct Workspace {
    int kv_heads;
    int splits;
    int queries;  // group * max_length
    int head_size;
    int64_t entries;

    NLD_HOST_DEVICE int64_t entry(int row, int kv_head, int split, int query) const {
        return ((static_cast<int64_t>(row) * kv_heads + kv_head) * splits + split) * queries + query;
    }
    NLD_HOST_DEVICE int64_t sums(int64_t entry) const { return entry * head_size; }
    NLD_HOST_DEVICE int64_t statistics(int64_t entry) const { return entries * head_size + 2 * entry; }
    NLD_HOST_DEVICE int64_t floats() const { return entries * (head_size + 2); }
};

inline Workspace workspace(int rows, int kv_heads, int splits, int queries, int head_size) {
    const int64_t entries = splits == 1 ? 0 : static_cast<int64_t>(rows) * kv_heads * splits * queries;
    return {kv_heads, splits, queries, head_size, entries};
}

// Softmax in base 2 over keys that come piece by piece.

// Factor for sums over earlier keys when the maximum grows. If no key was visible so far (-inf), 0.
NLD_HOST_DEVICE float softmax_base(float maximum) { return maximum == minus_infinity() ? 0.0f : maximum; }

// The launch.

constexpr int kTokensPerSplit = 256;  // a shorter part of a prefix is not worth a CTA
constexpr int kMostSplits = 64;
constexpr int kCtasPerProcessor = 2;

// Depends only on padded sizes, so that a captured graph stays correct when lengths change.
inline int choose_splits(int rows, int kv_heads, int m_tiles, int max_prefix, int processors, int limit) {
    const int64_t ctas = static_cast<int64_t>(rows) * kv_heads * m_tiles;
    if (ctas == 0) return 1;
    const int64_t room = static_cast<int64_t>(processors) * kCtasPerProcessor / ctas;
    const int useful = least(ceil_div(max_prefix, kTokensPerSplit), limit > 0 ? limit : kMostSplits);
    return most(1, room < useful ? static_cast<int>(room) : useful);
}

inline int padded_head_size(int head_size) {
    const int in_thirty_twos = ceil_div(head_size, 32);
    return in_thirty_twos <= 4 ? 32 * in_thirty_twos : in_thirty_twos <= 6 ? 192 : 256;
}

}  // namespace nld
