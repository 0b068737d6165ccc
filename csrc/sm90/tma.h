// Host side of TMA: the tensor map over a paged cache. The driver's encoder is looked up at run time, so nothing links
// against libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../check.h"
#include "../params.h"

namespace flashmla::sm90 {

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static const auto encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        cuda_check(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
            "cudaGetDriverEntryPointByVersion");
        if (found != cudaDriverEntryPointSuccess) {
            throw std::runtime_error("the NVIDIA driver has no cuTensorMapEncodeTiled (CUDA 12.0): update it");
        }
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    return encoder;
}

// What a slice of a map is: `values` of one type, whose bytes are those of a swizzle.
struct SliceKind {
    CUtensorMapDataType type;
    cuuint64_t value_bytes;
    CUtensorMapSwizzle swizzle;
    cuuint64_t bytes;
};

// The cache [num_pages, page_size, h_k, 64 * kSlices] as (64, page_size, kSlices, h_k, num_pages), innermost first: a
// box is 64 tokens of one head and page, `box_slices` slices of [64 tokens, 64 values] one after the other in the
// swizzle of its kind. What lies outside, such as a page that does not exist, arrives as zeros.
inline CUtensorMap paged_map(const FwdParams& params, int slices, int box_slices, const SliceKind& kind) {
    constexpr int kRank = 5;
    const cuuint64_t sizes[kRank] = {64, static_cast<cuuint64_t>(params.page_size), static_cast<cuuint64_t>(slices),
                                     static_cast<cuuint64_t>(params.h_k), static_cast<cuuint64_t>(params.num_pages)};
    // the stride of a dimension of size 1 is arbitrary in PyTorch, but not here
    const auto stride_bytes = [&](cuuint64_t size, int64_t stride) {
        return size == 1 ? cuuint64_t{128} : static_cast<cuuint64_t>(stride) * kind.value_bytes;
    };
    const cuuint64_t strides[kRank - 1] = {stride_bytes(sizes[1], params.cache_stride_token), kind.bytes,
                                           stride_bytes(sizes[3], params.cache_stride_head),
                                           stride_bytes(sizes[4], params.cache_stride_page)};
    const cuuint32_t box[kRank] = {64, 64, static_cast<cuuint32_t>(box_slices), 1, 1};
    const cuuint32_t steps[kRank] = {1, 1, 1, 1, 1};

    CUtensorMap map;
    // 128 bytes is what a token has of a slice of 16-bit values; read in pieces of 256 these come up to 10 % slower,
    // and bytes no differently (csrc/NOTES.md, section 12)
    const CUresult result = tensor_map_encoder()(&map, kind.type, kRank, const_cast<void*>(params.kv_cache), sizes,
                                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, kind.swizzle,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error(
            "kv_cache: no tensor map for sizes [" + std::to_string(params.num_pages) + ", " +
            std::to_string(params.page_size) + ", " + std::to_string(params.h_k) + ", " + std::to_string(64 * slices) +
            "], strides [" + std::to_string(params.cache_stride_page) + ", " +
            std::to_string(params.cache_stride_token) + ", " + std::to_string(params.cache_stride_head) +
            ", 1] (CUresult " + std::to_string(result) + ")");
    }
    return map;
}

// Of values in params.dtype.
inline CUtensorMap paged_cache_map(const FwdParams& params, int slices, int box_slices) {
    const auto type = params.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return paged_map(params, slices, box_slices, {type, 2, CU_TENSOR_MAP_SWIZZLE_128B, 128});
}

// Of bytes; a box has all slices.
inline CUtensorMap paged_bytes_map(const FwdParams& params, int slices) {
    return paged_map(params, slices, slices, {CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_64B, 64});
}

}  // namespace flashmla::sm90
