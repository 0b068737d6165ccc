// From e4m3 to T: bf16 or fp16.
//
// Sign, exponent and mantissa shifted to their places in T make a number that is too small by a power of two (2^120 for
// bf16, 2^8 for fp16), subnormals too; one product with the scale makes it right. A scale of many digits has a second,
// smaller product: what T's first has left out. So values are those of CacheFormat.dequantize, but for the last place
// now and then where scales are no powers of two. Values without a scale are one instruction of the machine in fp16 (as
// fast as any of the three that shift them); none converts to bf16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "ptx.cuh"
#include "row_tile.cuh"

namespace flashmla::sm90 {

template <typename T>
constexpr bool kIsBF16 = std::is_same_v<T, __nv_bfloat16>;
// Where a pair of e4m3 values goes in a pair of T's, from two lanes of 16 bits that have a byte each and its sign
// above.
template <typename T>
constexpr int kShift = kIsBF16<T> ? 4 : 7;
template <typename T>
constexpr uint32_t kPlaces = kIsBF16<T> ? 0x87f087f0 : 0xbf80bf80;
template <typename T>
constexpr float kUnit = kIsBF16<T> ? 0x1p120f : 0x1p8f;  // what the pair is too small by
constexpr float kGreatestScale = 128.f;                  // below it, scale * kUnit is a number of T

template <typename T>
using Pair = std::conditional_t<kIsBF16<T>, __nv_bfloat162, __half2>;

template <typename T>
__device__ __forceinline__ Pair<T> as_pair(uint32_t bits) {
    Pair<T> pair;
    memcpy(&pair, &bits, 4);
    return pair;
}
template <typename Pair>
__device__ __forceinline__ uint32_t as_bits(const Pair& pair) {
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// Bytes i and j of `low` (0 to 3) and `high` (4 to 7) as a pair that is too small by kUnit.
template <typename T>
__device__ __forceinline__ Pair<T> spread(uint32_t low, uint32_t high, int i, int j) {
    const uint32_t signs = ptx::permute(low, high, (8 + j) << 12 | j << 8 | (8 + i) << 4 | i);
    return as_pair<T>(signs << kShift<T> & kPlaces<T>);
}

// A factor as two numbers of T, a great one in the lower half and what it leaves.
template <typename T>
__device__ __forceinline__ uint32_t split_factor(float factor) {
    const float great = __low2float(as_pair<T>(pack<T>(factor, 0.f)));
    return pack<T>(factor, factor - great);
}
template <typename T>
__device__ __forceinline__ uint32_t factors_of(float scale) {
    return split_factor<T>(scale * kUnit<T>);
}

// Has the sign of each byte that is e4m3's NaN, which has all bits but the sign: one more changes it. (A byte above one
// that is NaN may show too.)
constexpr uint32_t kByteSigns = 0x80808080;
__device__ __forceinline__ uint32_t nans(uint32_t word) { return (word + 0x01010101) ^ word; }

// 16 values of a row in T, two chunks of 8. kProducts: 0, the values themselves; 1, times the great one of
// factors_of(scale), where that is all of it; 2, times both. NaN makes all of them NaN, as the row's score is.
template <typename T, int kProducts>
__device__ __forceinline__ void convert(const uint4& bytes, uint32_t factors, uint4 (&chunks)[2]) {
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    if constexpr (kProducts == 0 && !kIsBF16<T>) {  // as the machine converts, NaN too
        chunks[0] = {ptx::fp16_of_e4m3<0>(words[0]), ptx::fp16_of_e4m3<1>(words[0]), ptx::fp16_of_e4m3<0>(words[1]),
                     ptx::fp16_of_e4m3<1>(words[1])};
        chunks[1] = {ptx::fp16_of_e4m3<0>(words[2]), ptx::fp16_of_e4m3<1>(words[2]), ptx::fp16_of_e4m3<0>(words[3]),
                     ptx::fp16_of_e4m3<1>(words[3])};
        return;
    }
    Pair<T> great = as_pair<T>(kProducts == 0 ? pack<T>(kUnit<T>, kUnit<T>) : ptx::permute(factors, 0, 0x1010));
    const Pair<T> small = as_pair<T>(ptx::permute(factors, 0, 0x3232));
    if ((nans(bytes.x) | nans(bytes.y) | nans(bytes.z) | nans(bytes.w)) & kByteSigns) great = as_pair<T>(0x7fff7fff);
    uint32_t packed[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const Pair<T> pair = spread<T>(words[i / 2], 0, i % 2 * 2, i % 2 * 2 + 1);
        packed[i] = as_bits(kProducts == 2 ? __hfma2(pair, great, __hmul2(pair, small)) : __hmul2(pair, great));
    }
    chunks[0] = {packed[0], packed[1], packed[2], packed[3]};
    chunks[1] = {packed[4], packed[5], packed[6], packed[7]};
}
template <typename T>
__device__ __forceinline__ void convert(const uint4& bytes, uint4 (&chunks)[2]) {
    convert<T, 0>(bytes, 0, chunks);
}

// The same by way of fp32, for scales that no T has.
template <typename T>
__device__ __forceinline__ void convert_slowly(const uint4& bytes, float scale, uint4 (&chunks)[2]) {
    convert<T>(bytes, chunks);
    uint32_t* words = reinterpret_cast<uint32_t*>(chunks);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const Pair<T> pair = as_pair<T>(words[i]);
        words[i] = pack<T>(__low2float(pair) * scale, __high2float(pair) * scale);
    }
}

// 8 bf16 values in T.
template <typename T>
__device__ __forceinline__ uint4 convert_bf16(const uint4& values) {
    if constexpr (kIsBF16<T>) return values;
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        packed[i] = pack<T>(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000));
    }
    return {packed[0], packed[1], packed[2], packed[3]};
}

// The greatest magnitudes of each half of bf16 pairs, as bits; infinities and NaN left out.
__device__ __forceinline__ uint32_t greatest_finite(const uint4& values) {
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
    uint32_t greatest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t magnitudes = words[i] & 0x7fff7fff;
        greatest = __vmaxu2(greatest, magnitudes & __vcmpltu2(magnitudes, 0x7f807f80));
    }
    return greatest;
}

// Rows in bf16 that multiply e4m3 become fp16, in units of a power of two that bring the row's greatest below 2^15:
// exact for values down to 2^-31 of that. From the row's greatest magnitudes in pairs, over all lanes that have them:
// what the values are to be multiplied by; 1 / that is the unit.
__device__ __forceinline__ float to_units(uint32_t greatest) {
    const uint32_t bits = max(greatest & 0xffff, greatest >> 16);
    return __uint_as_float(min(127 + 14 + 127 - (bits >> 7), 253u) << 23);
}

// By way of shared memory.
__device__ __forceinline__ void leave_unit(float& shared_unit, float factor) { shared_unit = inverse_power(factor); }
__device__ __forceinline__ float take_unit(const float& shared_unit) { return shared_unit; }

// 8 bf16 values times a power of two, in fp16.
__device__ __forceinline__ uint4 fp16_of_bf16(const uint4& values, float factor) {
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        packed[i] =
            pack<__half>(__uint_as_float(words[i] << 16) * factor, __uint_as_float(words[i] & 0xffff0000) * factor);
    }
    return {packed[0], packed[1], packed[2], packed[3]};
}

}  // namespace flashmla::sm90
