// Vectors of NLD_LANES floats with the compiler's vector extension: one source for every instruction set.
// Included only by the kernels' headers, inside the namespace of an instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nld::NLD_ISA {

constexpr int kLanes = NLD_LANES;
typedef float Vec __attribute__((vector_size(4 * NLD_LANES)));
typedef int32_t IVec __attribute__((vector_size(4 * NLD_LANES)));

// Not `Vec{} + x`: the compiler must keep that addition, because it turns a negative zero into a positive one.
inline Vec splat(float x) {
#if NLD_LANES == 16
    return _mm512_set1_ps(x);
#elif NLD_LANES == 8
    return _mm256_set1_ps(x);
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = x;
    return v;
#endif
}
inline IVec isplat(int32_t x) { return IVec{} + x; }

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec vmax(Vec a, Vec b) {
#if NLD_LANES == 16
    return _mm512_max_ps(a, b);
#elif NLD_LANES == 8
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline float reduce_max(Vec v) {
#if NLD_LANES == 16
    return _mm512_reduce_max_ps(v);
#else
    float best = v[0];
    for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

// Whether any lane is above the bound, or NaN.
template <int kCount>
inline bool any_above(const Vec (&vectors)[kCount], Vec bound) {
#if NLD_LANES == 16
    __mmask16 above = 0;
#pragma GCC unroll 8
    for (const Vec& v : vectors) above |= _mm512_cmp_ps_mask(v, bound, _CMP_NLE_UQ);
    return above != 0;
#elif NLD_LANES == 8
    Vec above{};
#pragma GCC unroll 8
    for (const Vec& v : vectors) above = _mm256_or_ps(above, _mm256_cmp_ps(v, bound, _CMP_NLE_UQ));
    return _mm256_movemask_ps(above) != 0;
#else
    IVec below = isplat(-1);
    for (const Vec& v : vectors) below &= v <= bound;
    int32_t all = -1;
    for (int i = 0; i < kLanes; ++i) all &= below[i];
    return all == 0;
#endif
}

// 2 to the power of x for x <= 126; 0 below -126, also for minus infinity and NaN. kTerms of the Taylor series.
template <int kTerms>
inline Vec exp2(Vec x) {
    constexpr float kCoefficients[] = {1.0f,          0.6931471806f, 0.2402265070f, 0.0555041087f,
                                       0.0096181291f, 0.0013333558f, 0.0001540353f};
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const Vec clipped = vmax(x, splat(-126.0f));
    const Vec shifted = clipped + kRound;
    const Vec rest = clipped - (shifted - kRound);
    Vec power = splat(kCoefficients[kTerms]);
#pragma GCC unroll 8
    for (int i = kTerms - 1; i >= 0; --i) power = power * rest + kCoefficients[i];
    const IVec scaled = reinterpret_cast<IVec>(power) + (reinterpret_cast<IVec>(shifted) << 23);
    const IVec visible = x > splat(-126.0f);
    return reinterpret_cast<Vec>(scaled & visible);
}

// v where the bit of the lane is set, minus infinity elsewhere.
inline Vec keep_visible(Vec v, uint32_t bits) {
#if NLD_LANES == 16
    return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), _mm512_set1_ps(-__builtin_inff()), v);
#else
    IVec lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
    const IVec seen = (isplat(static_cast<int32_t>(bits)) & lane) != isplat(0);
    const IVec hidden = reinterpret_cast<IVec>(splat(-__builtin_inff()));
    return reinterpret_cast<Vec>((reinterpret_cast<IVec>(v) & seen) | (hidden & ~seen));
#endif
}

}  // namespace nld::NLD_ISA
