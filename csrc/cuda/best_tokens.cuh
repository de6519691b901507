// best_tokens: a CTA searches one segment of one row, whose logits it holds in registers; a warp per row then combines
// the segments. Segments do not depend on the batch, and neither does a row's result.
#pragma once

#include "nld_cuda.h"
#include "platform.cuh"

namespace nld {

constexpr int kBestThreads = 128;
constexpr int kBestWarps = kBestThreads / 32;
constexpr int kBestSegment = 4096;  // logits: 32 a thread
constexpr float kLog2E = 1.44269504089f;

// Result for some of a row's logits.
struct alignas(16) BestPart {
    float largest;  // NaN if any is
    int token;      // the first one with the largest logit, or the first one that is NaN
    float sum;      // of exp(logit - largest); 0 for minus infinity only; without meaning for other infinities and NaN
};

struct BestParams {
    const void* logits;
    int64_t row_stride;
    BestPart* parts;  // [rows, segments]
    int64_t* tokens;
    float* largest;
    float* normalizers;  // or null
    int vocab;
    int segments;
    bool aligned;  // every row begins at a multiple of 16 bytes
};

NLD_HOST_DEVICE bool precedes(const BestPart& a, const BestPart& b) {
    const bool a_strange = a.largest != a.largest, b_strange = b.largest != b.largest;
    if (a_strange || b_strange) return a_strange && (!b_strange || a.token < b.token);
    return a.largest > b.largest || (a.largest == b.largest && a.token < b.token);
}

// A part's sum relative to a logit that is at least as large. Minus infinity minus itself would be NaN.
NLD_DEVICE float sum_relative_to(float largest, const BestPart& part) {
    return part.largest == minus_infinity() ? 0.0f : part.sum * exp2_fast((part.largest - largest) * kLog2E);
}

NLD_DEVICE BestPart combined(const BestPart& a, const BestPart& b) {
    const bool second = precedes(b, a);
    const float largest = second ? b.largest : a.largest;
    return {largest, second ? b.token : a.token, sum_relative_to(largest, a) + sum_relative_to(largest, b)};
}

// Every lane gets the warp's result.
NLD_DEVICE BestPart combined_over_warp(BestPart part) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        const BestPart other = {shuffle_xor(part.largest, mask), shuffle_xor(part.token, mask),
                                shuffle_xor(part.sum, mask)};
        part = combined(part, other);
    }
    return part;
}

// 16 bytes of logits.
struct alignas(16) LogitChunk {
    uint32_t words[4];
};

template <typename T>
NLD_DEVICE float logit_of(const LogitChunk& chunk, int index) {
    if constexpr (sizeof(T) == 2)
        return to_float(T{static_cast<uint16_t>(chunk.words[index / 2] >> (16 * (index % 2)))});
    else
        return float_from_bits(chunk.words[index]);
}

// Minus infinity stands for logits past the row's end.
template <typename T>
NLD_DEVICE LogitChunk load_logits(const T* row, int first, int vocab, bool aligned) {
    constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
    if (aligned && first + kChunk <= vocab) return *reinterpret_cast<const LogitChunk*>(row + first);
    float logits[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) logits[i] = first + i < vocab ? to_float(row[first + i]) : minus_infinity();
    LogitChunk chunk;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        if constexpr (sizeof(T) == 2)
            chunk.words[word] = pack<T>(logits[2 * word], logits[2 * word + 1]);
        else
            chunk.words[word] = bits_from_float(logits[word]);
    }
    return chunk;
}

// Result for this thread's logits of a segment. All loads are issued before the first logit is used.
template <typename T, bool kSum>
NLD_DEVICE BestPart search_segment(const BestParams& params, const T* row, int segment) {
    constexpr int kChunk = 16 / static_cast<int>(sizeof(T)), kStep = kBestThreads * kChunk;
    constexpr int kChunks = kBestSegment / kStep;
    const int first = segment * kBestSegment + thread_index() * kChunk;
    LogitChunk chunks[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) chunks[i] = load_logits<T>(row, first + i * kStep, params.vocab, params.aligned);
    BestPart best = {minus_infinity(), first, 0.0f};
#pragma unroll
    for (int i = 0; i < kBestSegment / kBestThreads; ++i) {
        const float logit = logit_of<T>(chunks[i / kChunk], i % kChunk);
        if (logit > best.largest || (logit != logit && best.largest == best.largest)) {
            best.largest = logit;
            best.token = first + i / kChunk * kStep + i % kChunk;
        }
    }
    if constexpr (kSum) {
        if (!(best.largest > minus_infinity())) return best;
#pragma unroll
        for (int i = 0; i < kBestSegment / kBestThreads; ++i)
            best.sum += exp2_fast((logit_of<T>(chunks[i / kChunk], i % kChunk) - best.largest) * kLog2E);
    }
    return best;
}

template <typename T, bool kSum>
NLD_KERNEL(kBestThreads)
best_segment(const NLD_GRID_CONSTANT BestParams params) {
    BestPart* of_warps = reinterpret_cast<BestPart*>(shared_memory());
    const int row = block_x(), segment = block_y();
    const T* logits = static_cast<const T*>(params.logits) + row * params.row_stride;
    const BestPart own = combined_over_warp(search_segment<T, kSum>(params, logits, segment));
    if (thread_index() % 32 == 0) of_warps[thread_index() / 32] = own;
    sync_threads();
    if (thread_index() != 0) return;
    BestPart best = of_warps[0];
    for (int warp = 1; warp < kBestWarps; ++warp) best = combined(best, of_warps[warp]);
    params.parts[static_cast<int64_t>(row) * params.segments + segment] = best;
}

NLD_KERNEL(32)
best_row(const NLD_GRID_CONSTANT BestParams params) {
    const int row = block_x();
    const BestPart* parts = params.parts + static_cast<int64_t>(row) * params.segments;
    BestPart best = {minus_infinity(), 0x7fffffff, 0.0f};
    for (int segment = thread_index(); segment < params.segments; segment += 32) best = combined(best, parts[segment]);
    best = combined_over_warp(best);
    if (thread_index() != 0) return;
    params.tokens[row] = best.token;
    params.largest[row] = best.largest;
    if (params.normalizers == nullptr) return;
    // An infinity or NaN replaces the whole sum.
    params.normalizers[row] = is_finite(best.largest) ? best.largest + natural_log(best.sum) : best.largest;
}

}  // namespace nld
