// Conversions between the dtypes of tensors and the two dtypes of the computation.
// Included only by the kernels' headers, inside the namespace of an instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace nld::NLD_ISA {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};
struct E4M3 {
    uint8_t bits;
};
struct E5M2 {
    uint8_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// Shifts the value into a float's exponent and mantissa, and corrects the bias by an exact multiplication.
inline float widen(uint32_t magnitude, int mantissa, int bias, bool negative) {
    const uint32_t bits = magnitude << (23 - mantissa);
    float y;
    std::memcpy(&y, &bits, 4);
    y *= __builtin_ldexpf(1.0f, 127 - bias);
    return negative ? -y : y;
}

inline float to_float(Half x) {
    const uint32_t magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00)
        return magnitude > 0x7c00 ? __builtin_nanf("") : (x.bits & 0x8000 ? -__builtin_inff() : __builtin_inff());
    return widen(magnitude, 10, 15, x.bits & 0x8000);
}

inline float to_float(E4M3 x) {
    const uint32_t magnitude = x.bits & 0x7f;
    return magnitude == 0x7f ? __builtin_nanf("") : widen(magnitude, 3, 7, x.bits & 0x80);
}

inline float to_float(E5M2 x) { return to_float(Half{static_cast<uint16_t>(x.bits << 8)}); }

inline BFloat16 to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// Rounds to nearest, ties to even.
inline Half to_half(float x) {
    const uint16_t sign = __builtin_signbit(x) ? 0x8000 : 0;
    const float magnitude = __builtin_fabsf(x);
    if (x != x) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 6.103515625e-05f)  // subnormal: steps of 2^-24
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(__builtin_nearbyintf(magnitude * 16777216.0f)))};
    uint32_t bits;
    std::memcpy(&bits, &magnitude, 4);
    bits += 0xfff + ((bits >> 13) & 1);
    return {static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)))};
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    return to_bfloat16(x);
}
template <>
inline Half from_float<Half>(float x) {
    return to_half(x);
}

}  // namespace nld::NLD_ISA
