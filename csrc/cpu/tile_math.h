// Products of a few query rows with packed keys or values, for one instruction set.
// Included only by tile_kernel.h.
#pragma once

#include "block_attention.h"
#include "convert.h"
#include "vector.h"

namespace nld::NLD_ISA {

// Products in float32: operands are converted when they are packed.
struct Float32Math {
    using Element = float;
    using Operand = Vec;
    static constexpr int kPair = 1;  // adjacent elements of the summed dimension
    static constexpr int kTerms = 6;
#if NLD_LANES == 16
    static constexpr int kRows = 8;
#else
    static constexpr int kRows = 4;
#endif
    static Operand load(const float* p) { return NLD_ISA::load(p); }
    static Operand broadcast(const float* p) { return splat(*p); }
    static Vec add(Vec sum, Operand a, Operand b) { return sum + a * b; }
    static float element(float x) { return x; }
    static void store(float* p, Vec v) { NLD_ISA::store(p, v); }
};

#if defined(NLD_BFLOAT16_PAIRS)
// Products of bfloat16 pairs, summed in float32.
struct BFloat16Math {
    using Element = BFloat16;
    using Operand = __m512bh;
    static constexpr int kPair = 2;
    static constexpr int kTerms = 4;  // probabilities are rounded to 8 bits anyway
    static constexpr int kRows = 8;
    static Operand load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Operand broadcast(const BFloat16* p) {
        int32_t pair;
        std::memcpy(&pair, p, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static Vec add(Vec sum, Operand a, Operand b) { return _mm512_dpbf16_ps(sum, a, b); }
    static BFloat16 element(float x) { return to_bfloat16(x); }
    static BFloat16 element(BFloat16 x) { return x; }
    static void store(BFloat16* p, Vec v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
    }
};
#endif

// c[kRows][2 vectors] (+)= a[kRows][steps * kPair] * b, where b is packed [steps][width][kPair]. Rows and steps of `a`
// lie kRow and kStep elements apart. These are template arguments, so that the compiler folds the addresses: with
// run-time strides the loop was bound by loads.
template <class Math, bool kAdd, int kRow, int kStep>
inline void multiply(const typename Math::Element* a, const typename Math::Element* b, int width, int steps, float* c,
                     int c_stride) {
    constexpr int kRows = Math::kRows, kPair = Math::kPair;
    Vec sum[kRows][2];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        sum[i][0] = kAdd ? load(c + i * c_stride) : Vec{};
        sum[i][1] = kAdd ? load(c + i * c_stride + kLanes) : Vec{};
    }
    for (int step = 0; step < steps; ++step) {
        const auto left = Math::load(b), right = Math::load(b + kLanes * kPair);
        b += width * kPair;
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const auto factor = Math::broadcast(a + i * kRow);
            sum[i][0] = Math::add(sum[i][0], factor, left);
            sum[i][1] = Math::add(sum[i][1], factor, right);
        }
        a += kStep;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        store(c + i * c_stride, sum[i][0]);
        store(c + i * c_stride + kLanes, sum[i][1]);
    }
}

}  // namespace nld::NLD_ISA
