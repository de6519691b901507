// One segment of one row's logits, for one instruction set: define NLD_ISA (a namespace) and NLD_LANES, then include.
//
// Every logit is loaded once, for the running maximum and for the sum of exponentials relative to it. A new maximum is
// rare in a long row, so its handling (find its place, rescale the sums) may be slow.
#pragma once

#include "best_tokens.h"
#include "convert.h"
#include "vector.h"

namespace nld::NLD_ISA {

typedef uint16_t HalfWords __attribute__((vector_size(2 * NLD_LANES)));

inline IVec load_words(const void* p) {
    HalfWords words;
    std::memcpy(&words, p, sizeof words);
    return __builtin_convertvector(words, IVec);
}

inline Vec widened(const float* p) { return load(p); }

inline Vec widened(const BFloat16* p) { return reinterpret_cast<Vec>(load_words(p) << 16); }

// Same conversion as to_float(). AVX2 does not imply the instruction.
inline Vec widened(const Half* p) {
#if NLD_LANES == 16
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    const IVec bits = load_words(p), magnitude = bits & 0x7fff, shifted = magnitude << 13;
    const IVec finite = reinterpret_cast<IVec>(reinterpret_cast<Vec>(shifted) * __builtin_ldexpf(1.0f, 112));
    const IVec special = magnitude >= 0x7c00;
    const IVec value = (finite & ~special) | ((shifted | 0x7f800000) & special);
    return reinterpret_cast<Vec>(value | (bits & 0x8000) << 16);
#endif
}

constexpr int kVectors = 4;  // vectors that are compared together
constexpr int kStep = kVectors * kLanes;

// Loads `count` logits, at most kStep, and fills the rest with minus infinity.
template <class T>
inline void load_step(const T* from, int64_t count, Vec (&to)[kVectors]) {
    if (count >= kStep) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) to[i] = widened(from + i * kLanes);
        return;
    }
    float rest[kStep];
    for (int i = 0; i < kStep; ++i) rest[i] = i < count ? to_float(from[i]) : -__builtin_inff();
    for (int i = 0; i < kVectors; ++i) to[i] = load(rest + i * kLanes);
}

// Index of the first of the largest logits, or of the first NaN.
inline int place_of_largest(const Vec (&logits)[kVectors], const float (&values)[kStep]) {
    int place = 0;
    if (any_above(logits, splat(__builtin_inff()))) {
        while (values[place] == values[place]) ++place;
        return place;
    }
    Vec top = logits[0];
    for (int i = 1; i < kVectors; ++i) top = vmax(top, logits[i]);
    const float peak = reduce_max(top);
    while (values[place] != peak) ++place;
    return place;
}

template <class T, bool kSum>
inline BestPart search(const T* logits, int64_t count, int64_t first_token) {
    constexpr float kLog2E = 1.44269504089f;
    BestPart best{first_token, -__builtin_inff(), 0.0};
    Vec largest = splat(best.largest), sums[kVectors] = {};
    for (int64_t at = 0; at < count; at += kStep) {
        Vec step[kVectors];
        load_step(logits + at, count - at, step);
        if (__builtin_expect(any_above(step, largest), 0)) {
            float values[kStep];
            for (int i = 0; i < kVectors; ++i) store(values + i * kLanes, step[i]);
            const int place = place_of_largest(step, values);
            best.token = first_token + at + place;
            best.largest = values[place];
            if (best.largest != best.largest) return best;
            if constexpr (kSum) {
                const Vec shrink = exp2<6>((largest - best.largest) * kLog2E);
                for (Vec& sum : sums) sum *= shrink;
            }
            largest = splat(best.largest);
        }
        if constexpr (kSum) {  // infinity minus infinity is NaN, which counts as 0
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) sums[i] += exp2<6>((step[i] - largest) * kLog2E);
        }
    }
    for (const Vec& sum : sums)
        for (int lane = 0; lane < kLanes; ++lane) best.sum += double{sum[lane]};
    return best;
}

template <class T>
inline BestPart search_segment(const BestTokens& call, int64_t row, int64_t segment) {
    const int64_t first = segment * kSegment, rest = call.vocab - first, count = rest < kSegment ? rest : kSegment;
    const T* logits = static_cast<const T*>(call.logits) + row * call.row_stride + first;
    return call.normalizers == nullptr ? search<T, false>(logits, count, first) : search<T, true>(logits, count, first);
}

inline void search_segment(const BestTokens& call, int64_t row, int64_t segment, BestPart& part) {
    switch (call.dtype) {
        case DType::kFloat32:
            part = search_segment<float>(call, row, segment);
            return;
        case DType::kFloat16:
            part = search_segment<Half>(call, row, segment);
            return;
        default:
            part = search_segment<BFloat16>(call, row, segment);
    }
}

}  // namespace nld::NLD_ISA
