// The largest logit of every row, its token and the row's normalizer. docs/developer/operators.md says what the
// arguments mean.
#pragma once

#include <cstdint>

#include "block_attention.h"

namespace nld {

struct BestTokens {
    const void* logits;  // [rows, vocab], inner stride 1
    DType dtype;         // not float8
    int64_t rows, vocab, row_stride;
    int64_t* tokens;
    float *largest, *normalizers;  // normalizers may be null
};

// A row is read in independent segments of this many tokens. Their results are combined in order, so the result depends
// neither on the number of threads nor on the other rows.
constexpr int64_t kSegment = 16384;

// Result of a segment.
struct BestPart {
    int64_t token;  // the first one with the largest logit, or the first one that is NaN
    float largest;  // NaN if any is
    double sum;     // of exp(logit - largest); 0 if all are minus infinity
};

// vocab > 0.
void best_tokens(const BestTokens& call, int threads, ParallelFor parallel);

}  // namespace nld
