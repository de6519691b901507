// Accept-prefix compaction, and the KV move of quadratic self-speculation. docs/operators.md says what the arguments
// mean.
#pragma once

#include <cstdint>
#include <vector>

#include "block_attention.h"

namespace nld {

struct AcceptPrefix {
    int rows;
    const int64_t *drafts, *targets;
    const int32_t* starts;
    int32_t *accepted, *token_starts;
    int64_t *tokens, *seeds;
};

void accept_prefix(const AcceptPrefix& call);

// [pages, kv_heads, page_size, head_dim]; strides in elements of `element` bytes.
struct MovedPages {
    char* data;
    int element;
    int64_t heads, page_size, dim;
    int64_t page_stride, head_stride, token_stride, dim_stride;
};

// Whether moves may run in any order: no target is another move's source, and no slot is written twice.
bool moves_are_independent(const int64_t* sources, const int64_t* targets, int64_t count);

void move_kv(const std::vector<MovedPages>& caches, const int64_t* sources, const int64_t* targets, int64_t count,
             int threads, ParallelFor parallel);

}  // namespace nld
