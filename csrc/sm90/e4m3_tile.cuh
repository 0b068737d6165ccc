// Tiles of an fp8 cache in shared memory as they lie in the cache: how they get there, and how values become operands
// of products in T without being written back. A product's order of keys, and of the dimensions that are summed over,
// is free as long as both operands have the same: so each lane reads what lies together.
#pragma once

#include <cuda/ptx>

#include "e4m3.cuh"
#include "fwd_kvcache_mla.cuh"
#include "row_tile.cuh"

namespace flashmla::sm90 {

constexpr int kLatents = kDimV / 64;  // slices of 64 latents
constexpr int kBlocks = 4;            // of 128 latents with a scale each

// How tokens lie, and which of 16 keys is at each place of a product: such that lanes that read at once do so from
// different banks, be it 16 bytes each of two keys that are neighbours there, or 8 bytes each of four that are
// neighbours but one. (With one scale for all the latter meet in twos; nothing avoids that.)
template <CacheFormat kFormat>
struct Layout;
template <>
struct Layout<CacheFormat::kFp8Blocks> {
    static constexpr bool kScaled = true;
    static constexpr int kRowBytes = 656;
    static constexpr int kScales = kDimV, kRope = kScales + 4 * kBlocks;
    __device__ static int key_of(int place) {
        const int pair = place % 8 / 2 * 2, odd = place / 8;
        return (place % 2 == 0 ? pair : 8 + (pair + 4) % 8) + odd;
    }
};
template <>
struct Layout<CacheFormat::kFp8Tensor> {
    static constexpr bool kScaled = false;
    static constexpr int kRowBytes = kDimQK;
    __device__ static int key_of(int place) {
        const int pair = place % 8 / 2;
        return place / 8 * 8 + (place % 2 == 0 ? pair : (pair + 4) ^ 1);
    }
};

// A pair in fp16 times a factor, rounded to T, which fp16 then has: the factor is below 2.
template <typename T>
__device__ __forceinline__ uint32_t times_rounded(uint32_t pair, float factor) {
    const __half2 values = as_pair<__half>(pair);
    const uint32_t packed = pack<T>(__low2float(values) * factor, __high2float(values) * factor);
    if constexpr (!kIsBF16<T>) return packed;
    return pack<__half>(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000));
}

// A place in the ring, and the phase of its barriers there.
template <int kStages>
struct Place {
    int slot = 0;
    uint32_t phase = 0;

    __device__ void next() {
        if (++slot == kStages) {
            slot = 0;
            phase ^= 1;
        }
    }
};

// A place in the ring from token `first` on, by one warp.
template <int kRowBytes>
__device__ __forceinline__ void zero_tokens(uint8_t* shared_place, int first) {
    uint4* zeros = reinterpret_cast<uint4*>(shared_place + first * kRowBytes);
    for (int i = threadIdx.x % 32; i < (kTile - first) * kRowBytes / 16; i += 32) zeros[i] = {};
}

// One warp: a tile's tokens to a place in the ring, as one piece if they lie together; no other row tile reads them
// (copy_keys in fwd_kvcache_mla.cuh says what L2 is told for that). What is not there becomes zeros: a page that does
// not exist, and with one scale for all what lies past the length, where e4m3's NaN would show.
template <CacheFormat kFormat>
__device__ __forceinline__ void load_tokens(const FwdParams& params, const uint8_t* from, bool there, int count,
                                            uint8_t* to, uint64_t* landed) {
    constexpr int kRowBytes = Layout<kFormat>::kRowBytes;
    const int lane = threadIdx.x % 32;
    if (!there || (!Layout<kFormat>::kScaled && count < kTile)) {
        zero_tokens<kRowBytes>(to, there ? count : 0);
        cuda::ptx::fence_proxy_async(cuda::ptx::space_shared);  // before copies to this place
        __syncwarp();
    }
    if (there) {
        if (lane == 0) {
            cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared,
                                                 landed, count * kRowBytes);
        }
        __syncwarp();
        if (params.cache_stride_token == kRowBytes) {
            if (lane == 0) ptx::copy_bulk(to, from, count * kRowBytes, landed, ptx::evict_first_policy());
        } else {
            for (int token = lane; token < count; token += 32) {
                ptx::copy_bulk(to + token * kRowBytes, from + token * params.cache_stride_token, kRowBytes, landed,
                               ptx::evict_first_policy());
            }
        }
    } else if (lane == 0) {
        cuda::ptx::mbarrier_arrive(landed);
    }
    __syncwarp();
}

// One warp: the segment's tiles, each as soon as there is room for it.
template <CacheFormat kFormat, typename SharedStorage, int kStages>
__device__ __forceinline__ void load_keys(const FwdParams& params, SharedStorage& shared, const RowTile& rows,
                                          const Segment& segment, Place<kStages>& place) {
    const Pages pages(params, segment);
    int page = pages.page_of(segment.begin), next_page = pages.page_of(segment.begin + 1);
    for (int tile = segment.begin; tile < segment.end; ++tile, place.next()) {
        const int page_after = pages.page_of(tile + 2);  // looked up two tiles ahead
        const uint8_t* from = static_cast<const uint8_t*>(params.kv_cache) + page * params.cache_stride_page +
                              pages.token_of(tile) * params.cache_stride_token + rows.head * params.cache_stride_head;
        wait(&shared.freed[place.slot], place.phase ^ 1);
        load_tokens<kFormat>(params, from, page >= 0, min(kTile, segment.length - tile * kTile),
                             shared.ring[place.slot], &shared.landed[place.slot]);
        page = next_page;
        next_page = page_after;
    }
}

// What this lane's e4m3 values are multiplied by. Each warp makes its keys', lane 4 i + block that of key i: at first
// the unit, if other than 1, which then is kUnit and the same for all, then the scale times what is left of kUnit, as a
// great and a small factor. `plain`: all scales of the warp are powers of two, and the great one is all.
struct Factors {
    uint32_t unit = 0, split = 0;
    float mantissa = 1.f;  // the scale over power_of(scale)
    bool plain = true;
};

// The greatest normal power of two that is not above |scale|, or the smallest.
__device__ __forceinline__ float power_of(float scale) {
    return __uint_as_float(max(__float_as_uint(scale) & 0x7f800000, 0x00800000));
}

// From the scale of this lane's key and block; `unit` and `plain` are the warp's.
template <typename T>
__device__ __forceinline__ Factors make_factors(float scale) {
    const bool usual = __all_sync(~0u, fabsf(scale) < kGreatestScale);
    Factors result;
    result.unit = usual ? pack<T>(1.f, 1.f) : pack<T>(kUnit<T>, kUnit<T>);
    result.split = split_factor<T>(usual ? scale * kUnit<T> : scale);
    if (!(fabsf(scale) < INFINITY)) result.split &= 0xffff;  // inf and NaN as they are
    const uint32_t bits = __float_as_uint(scale);
    const bool subnormal = (bits & 0x7f800000) == 0;
    result.mantissa = subnormal ? scale * 0x1p126f : __uint_as_float((bits & 0x807fffff) | 0x3f800000);
    result.plain = __all_sync(~0u, (bits & 0x007fffff) == 0) && usual;
    return result;
}

// A pair of values that spread() made times their scale, in T; with one for all as they are.
template <typename T, bool kScaled, bool kPlain>
__device__ __forceinline__ uint32_t scaled(Pair<T> pair, uint32_t unit, uint32_t great, uint32_t small) {
    if constexpr (!kScaled) return as_bits(pair);
    if constexpr (kPlain) return as_bits(__hmul2(pair, as_pair<T>(great)));
    pair = __hmul2(pair, as_pair<T>(unit));
    return as_bits(__hfma2(pair, as_pair<T>(great), __hmul2(pair, as_pair<T>(small))));
}

}  // namespace flashmla::sm90
