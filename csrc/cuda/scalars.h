// 16-bit and 8-bit floating-point numbers as bit patterns, and their conversions, on the device and on the host.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define NLD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NLD_HOST_DEVICE inline
#endif

namespace nld {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

NLD_HOST_DEVICE float float_from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

NLD_HOST_DEVICE uint32_t bits_from_float(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

NLD_HOST_DEVICE float minus_infinity() { return float_from_bits(0xff800000u); }
NLD_HOST_DEVICE bool is_finite(float value) { return (bits_from_float(value) & 0x7f800000u) != 0x7f800000u; }

NLD_HOST_DEVICE float to_float(float value) { return value; }
NLD_HOST_DEVICE float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }
NLD_HOST_DEVICE float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t exponent = (value.bits >> 10) & 31u, mantissa = value.bits & 1023u;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) {  // subnormal: mantissa * 2^-24
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
#endif
}

// The nearest representable number, ties to even.
template <typename T>
NLD_HOST_DEVICE T from_float(float value);

template <>
NLD_HOST_DEVICE float from_float<float>(float value) {
    return value;
}

template <>
NLD_HOST_DEVICE BFloat16 from_float<BFloat16>(float value) {
    BFloat16 result;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    const uint32_t bits = bits_from_float(value);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    result.bits = nan ? 0x7fff : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
#endif
    return result;
}

template <>
NLD_HOST_DEVICE Float16 from_float<Float16>(float value) {
    Float16 result;
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7fffffffu;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7fff;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        half = 0x7c00;
    } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 at the bottom
        half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
    }
    result.bits = static_cast<uint16_t>(sign | half);
#endif
    return result;
}

// Two numbers in one register, the first in the lower half, as the tensor cores need them.
template <typename T>
NLD_HOST_DEVICE uint32_t pack(float first, float second) {
    return from_float<T>(first).bits | (static_cast<uint32_t>(from_float<T>(second).bits) << 16);
}

#ifdef __CUDA_ARCH__
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float first, float second) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}
template <>
__device__ __forceinline__ uint32_t pack<Float16>(float first, float second) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}
#endif

// float8_e4m3fn: no infinities, 0x7f and 0xff are NaN. Its fields, shifted into a float16, are off by 2^8.
NLD_HOST_DEVICE float float_from_e4m3(uint8_t bits) {
    const Float16 shifted = {static_cast<uint16_t>(((bits & 0x80) << 8) | ((bits & 0x7f) << 7))};
    return (bits & 0x7f) == 0x7f ? float_from_bits(0x7fffffffu) : to_float(shifted) * 256.0f;
}

// float8_e5m2 is the upper half of a float16.
NLD_HOST_DEVICE float float_from_e5m2(uint8_t bits) {
    const Float16 wide = {static_cast<uint16_t>(bits << 8)};
    return to_float(wide);
}

}  // namespace nld
