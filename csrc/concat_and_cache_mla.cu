// concat_and_cache_mla: kv_cache[slot[t] / page_size, slot[t] % page_size, 0] = [kv_c[t], k_pe[t]] for every token t,
// as it is or in fp8 (flashmla_ops/kv_cache.py). A slot outside the cache (-1: skip) writes nothing. Any architecture.
//
// Three kernels, in all of which a thread asks for its values before it waits for its token's slot:
//   copy        moves bytes, in vectors of 16, so it needs no dtype.
//   fp8_tensor  gives a thread 16 values, which become 16 bytes of the cache.
//   fp8_blocks  gives a warp a token, 16 values a lane: 8 lanes find their 128 values' scale by shuffles, and 512
//   values
//               are one step.
// The grids of the first two are of CTAs [tokens, units of a token], so that nothing is divided: 4 tokens of 72 vectors
// in bf16 keep 288 threads busy with one load each, and 7 CTAs fill a multiprocessor.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cstring>

#include "check.h"
#include "params.h"

namespace flashmla {
namespace {

constexpr int kThreads = 288;  // at most, of a CTA of several tokens
constexpr int kWarps = 4;      // of a CTA with a token a warp
constexpr int kValues = 16;    // of a thread
constexpr int kBlock = 128;    // values that share a scale
constexpr int kBlockLanes = kBlock / kValues;
constexpr float kE4M3Max = 448.f;
constexpr float kSmallestScale = 0x1p-126f;

// ---------------------------------------------------------------------------------------------------- device helpers

// Where the tokens of slots lie. The page is found by multiplication: nothing that waits for its slot divides.
struct Places {
    int64_t page_size, token_stride, page_gap;  // page_gap: what a page's stride is more than its tokens take
    uint32_t multiplier;                        // ceil(2^(32 + shift) / page_size), for slots below 2^31
    int shift;                                  // ceil(log2(page_size)) - 1; -1: there are more slots

    explicit Places(const AppendParams& params)
        : page_size(params.page_size),
          token_stride(params.token_stride),
          page_gap(params.page_stride - params.page_size * params.token_stride),
          multiplier(0),
          shift(-1) {
        if (params.num_slots > INT_MAX || page_size > INT_MAX) return;
        shift = std::bit_width(static_cast<uint32_t>(page_size - 1)) - 1;
        multiplier = static_cast<uint32_t>(((uint64_t{1} << (32 + shift)) - 1) / static_cast<uint64_t>(page_size) + 1);
    }

    // In vectors from the cache's start; the slot is inside the cache.
    __device__ int64_t of(int64_t slot) const {
        const int64_t page = shift >= 0 ? __umulhi(static_cast<uint32_t>(slot), multiplier) >> shift : slot / page_size;
        return slot * token_stride + page * page_gap;
    }
};

// Loads that stay where they are: a plain one the compiler moves behind the test of the slot, to wait after the slot.
__device__ int4 load_now(const int4* from) {
    int4 bytes;
    asm volatile("ld.relaxed.cta.global.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bytes.x), "=r"(bytes.y), "=r"(bytes.z), "=r"(bytes.w)
                 : "l"(from));
    return bytes;
}

__device__ float load_now(const float* from) {
    float value;
    asm volatile("ld.relaxed.cta.global.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
}

__device__ bool is_inside(const AppendParams& params, int64_t slot) { return slot >= 0 && slot < params.num_slots; }

// ------------------------------------------------------------------------------------------------ arithmetic of fp8
// It must give the bytes that torch gives on an x86 CPU, NaN's sign included: __host__ too, so that it can be compared
// with torch without a GPU. Divisions are IEEE's and subnormal numbers are kept: no fast-math flags here.

__host__ __device__ inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

__host__ __device__ inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

// Two values of a 32-bit word, or of two, as fp32. The sign of a NaN is kept, which converting instructions drop.
template <typename T>
struct Two;
template <>
struct Two<__nv_bfloat16> {
    uint32_t word;
    __host__ __device__ float2 floats() const { return {float_of(word << 16), float_of(word & 0xffff0000)}; }
};
template <>
struct Two<__half> {
    uint32_t word;
    __host__ __device__ static float to_float(uint32_t half) {
        const float x = __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
        return float_of((bits_of(x) & 0x7fffffff) | (half & 0x8000) << 16);
    }
    __host__ __device__ float2 floats() const { return {to_float(word & 0xffff), to_float(word >> 16)}; }
};
template <>
struct Two<float> {
    float2 values;
    __host__ __device__ float2 floats() const { return values; }
};

// Rounded to bf16. Of NaN there is one only, but for bf16 itself: what torch makes of it depends on the CPU.
template <typename T>
__host__ __device__ inline uint32_t two_bf16(Two<T> two) {
    const float2 x = two.floats();
    const __nv_bfloat16_raw low = __float2bfloat16_rn(x.x), high = __float2bfloat16_rn(x.y);
    return low.x | static_cast<uint32_t>(high.x) << 16;
}
template <>
__host__ __device__ inline uint32_t two_bf16(Two<__nv_bfloat16> two) {
    return two.word;
}

// A block's scale from its largest finite magnitude.
__host__ __device__ inline float scale_of(float largest, bool round_scale) {
    if (largest == 0) return 1;
    const float scale = fmaxf(largest / kE4M3Max, kSmallestScale);
    return round_scale ? float_of((bits_of(scale) + 0x7fffff) & 0xff800000) : scale;  // up to a power of two
}

// x / scale. What a division makes of NaN, 0 / 0 and inf / inf is a NaN with a sign on x86, and without on a GPU.
__host__ __device__ inline float quotient(float x, float scale) {
    const float q = x / scale;
    if (q == q) return q;
    return x != x ? x : scale != scale ? scale : float_of(0xffc00000);
}

// x / scale for a scale that is a power of two from 2^-126 to 2^126: the same, sooner.
__host__ __device__ inline float quotient_by_power(float x, float one_over_scale) {
    return x != x ? x : x * one_over_scale;
}

// Four values as e4m3: the nearest, ties to even; beyond 448, inf too, 448; NaN is 0x7f with its sign.
__host__ __device__ inline uint32_t four_e4m3(const float* x) {
    const uint32_t low = __nv_cvt_float2_to_fp8x2({x[0], x[1]}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({x[2], x[3]}, __NV_SATFINITE, __NV_E4M3);
    uint32_t signs = 0;  // of NaN the conversion drops it; others have it already
#pragma unroll
    for (int k = 0; k < 4; ++k) signs |= bits_of(x[k]) >> 31 << (8 * k + 7);
    return low | high << 16 | signs;
}

__host__ __device__ inline int4 sixteen_e4m3(const float (&x)[kValues]) {
    return {static_cast<int>(four_e4m3(x)), static_cast<int>(four_e4m3(x + 4)), static_cast<int>(four_e4m3(x + 8)),
            static_cast<int>(four_e4m3(x + 12))};
}

// The bits of |x|, which order like the values; 0 for inf and NaN.
__host__ __device__ inline uint32_t finite_magnitude(float x) {
    const uint32_t magnitude = bits_of(x) & 0x7fffffff;
    return magnitude < 0x7f800000 ? magnitude : 0;
}

// ------------------------------------------------------------------------------------------------------------- loads

// A thread's values as they lie in memory: all loads can be under way before the first is used.
template <typename T>
struct alignas(16) Values {
    Two<T> twos[kValues / 2];
    __host__ __device__ void to_floats(float (&x)[kValues]) const {
#pragma unroll
        for (int k = 0; k < kValues / 2; ++k) {
            const float2 two = twos[k].floats();
            x[2 * k] = two.x;
            x[2 * k + 1] = two.y;
        }
    }
};

template <typename T>
__device__ Values<T> load_values(const int4* row, int unit) {
    constexpr int kVectors = sizeof(Values<T>) / sizeof(int4);
    int4 vectors[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) vectors[k] = load_now(row + unit * kVectors + k);
    Values<T> values;
    memcpy(&values, vectors, sizeof(values));
    return values;
}

// How many units of 16 values so many vectors of 16 bytes hold.
template <typename T>
__host__ __device__ int units_of(int vectors) {
    return vectors / static_cast<int>(sizeof(T));
}

// ----------------------------------------------------------------------------------------------------------- kernels

__global__ void __launch_bounds__(kThreads)
    concat_and_cache_mla_kernel(const AppendParams params, const Places places) {
    const int vectors = params.kv_c_vectors + params.k_pe_vectors;
    const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (token >= params.n) return;
    for (int vector = threadIdx.x; vector < vectors; vector += blockDim.x) {
        const int64_t slot = __ldg(params.slot_mapping + token);
        const bool latent = vector < params.kv_c_vectors;
        const int4* row = latent ? static_cast<const int4*>(params.kv_c) + token * params.kv_c_stride
                                 : static_cast<const int4*>(params.k_pe) + token * params.k_pe_stride;
        const int4 bytes = load_now(row + (latent ? vector : vector - params.kv_c_vectors));
        if (is_inside(params, slot)) static_cast<int4*>(params.kv_cache)[places.of(slot) + vector] = bytes;
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    concat_and_cache_mla_fp8_tensor_kernel(const AppendParams params, const Places places) {
    const int kv_c_units = units_of<T>(params.kv_c_vectors), units = kv_c_units + units_of<T>(params.k_pe_vectors);
    const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (token >= params.n) return;
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
        const int64_t slot = __ldg(params.slot_mapping + token);
        const float scale = load_now(params.kv_scale);
        const bool latent = unit < kv_c_units;
        const int4* row = latent ? static_cast<const int4*>(params.kv_c) + token * params.kv_c_stride
                                 : static_cast<const int4*>(params.k_pe) + token * params.k_pe_stride;
        const Values<T> values = load_values<T>(row, latent ? unit : unit - kv_c_units);
        if (!is_inside(params, slot)) return;
        float x[kValues];
        values.to_floats(x);
#pragma unroll
        for (float& value : x) value = quotient(value, scale);
        static_cast<int4*>(params.kv_cache)[places.of(slot) + unit] = sixteen_e4m3(x);
    }
}

// A token's row: 16 latents a unit, a scale for every 8 units, pairs of rotated values, and zeros up to 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    concat_and_cache_mla_fp8_blocks_kernel(const AppendParams params, const Places places) {
    const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (token >= params.n) return;
    const int lane = threadIdx.x % 32;
    const int units = units_of<T>(params.kv_c_vectors), pairs = units_of<T>(params.k_pe_vectors) * kValues / 2;
    const int scales = (units + kBlockLanes - 1) / kBlockLanes;
    const int words = (scales + pairs + 3) / 4 * 4 - scales;  // of 4 bytes, after the scales
    const int4* kv_c = static_cast<const int4*>(params.kv_c) + token * params.kv_c_stride;
    const auto* k_pe =
        reinterpret_cast<const Two<T>*>(static_cast<const int4*>(params.k_pe) + token * params.k_pe_stride);

    const auto load_unit = [&](int unit) { return unit < units ? load_values<T>(kv_c, unit) : Values<T>{}; };
    const auto load_pair = [&](int pair) { return pair < pairs ? k_pe[pair] : Two<T>{}; };
    const int64_t slot = __ldg(params.slot_mapping + token);
    Values<T> values = load_unit(lane);
    Two<T> pair = load_pair(lane);
    if (!is_inside(params, slot)) return;  // the whole warp
    int4* to = static_cast<int4*>(params.kv_cache) + places.of(slot);
    float* scales_to = reinterpret_cast<float*>(to + units);
    uint32_t* words_to = reinterpret_cast<uint32_t*>(scales_to + scales);

#pragma unroll 1
    for (int word = lane; word < words; word += 32) {
        words_to[word] = two_bf16(pair);
        pair = load_pair(word + 32);
    }
    for (int first = 0; first < units; first += 32) {
        const int unit = first + lane;
        float x[kValues];
        values.to_floats(x);
        values = load_unit(unit + 32);
        uint32_t largest = 0;
#pragma unroll
        for (const float value : x) largest = max(largest, finite_magnitude(value));
#pragma unroll
        for (int other = 1; other < kBlockLanes; other *= 2)
            largest = max(largest, __shfl_xor_sync(~0u, largest, other));
        const float scale = scale_of(float_of(largest), params.round_scale);
        if (params.round_scale) {
            const float one_over_scale = float_of(0x7f000000 - bits_of(scale));
#pragma unroll
            for (float& value : x) value = quotient_by_power(value, one_over_scale);
        } else {
#pragma unroll
            for (float& value : x) value = quotient(value, scale);
        }
        if (unit < units) {
            to[unit] = sixteen_e4m3(x);
            if (lane % kBlockLanes == 0) scales_to[unit / kBlockLanes] = scale;
        }
    }
}

// --------------------------------------------------------------------------------------------------------- launchers

// A CTA [tokens, units] for tokens of so many units.
dim3 several_tokens(int units) {
    const int width = std::clamp(units, 1, kThreads);
    return dim3(width, kThreads / width);
}

unsigned blocks_for(int64_t n, int64_t tokens) { return static_cast<unsigned>((n + tokens - 1) / tokens); }

template <typename T>
void launch_fp8(const AppendParams& params, cudaStream_t stream) {
    if (params.kv_scale != nullptr) {
        const dim3 threads = several_tokens(units_of<T>(params.kv_c_vectors + params.k_pe_vectors));
        concat_and_cache_mla_fp8_tensor_kernel<T>
            <<<blocks_for(params.n, threads.y), threads, 0, stream>>>(params, Places(params));
    } else {
        concat_and_cache_mla_fp8_blocks_kernel<T>
            <<<blocks_for(params.n, kWarps), kWarps * 32, 0, stream>>>(params, Places(params));
    }
    cuda_check(cudaGetLastError(), "concat_and_cache_mla");
}

}  // namespace

void concat_and_cache_mla(const AppendParams& params, cudaStream_t stream) {
    const dim3 threads = several_tokens(params.kv_c_vectors + params.k_pe_vectors);
    concat_and_cache_mla_kernel<<<blocks_for(params.n, threads.y), threads, 0, stream>>>(params, Places(params));
    cuda_check(cudaGetLastError(), "concat_and_cache_mla");
}

void concat_and_cache_mla_fp8(const AppendParams& params, cudaStream_t stream) {
    switch (params.dtype) {
        case DType::kBF16: return launch_fp8<__nv_bfloat16>(params, stream);
        case DType::kFP16: return launch_fp8<__half>(params, stream);
        case DType::kFP32: return launch_fp8<float>(params, stream);
    }
}

}  // namespace flashmla
