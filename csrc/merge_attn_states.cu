// merge_attn_states: two attentions over disjoint keys, as one.
//
//   lse = log(exp(lse_a) + exp(lse_b)),   out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b
//
// +inf and -inf mean that a side saw no key: it then has weight 0 and its output, which may hold anything, is not read.
// With no key on either side out = 0, lse = +inf.
//
// Grid: one CTA per kRows rows (b, s_q, h_q); a row of 512 bf16 values is 64 vectors of 16 bytes, one a thread.
// Any architecture.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.h"
#include "params.h"

namespace flashmla {
namespace {

constexpr int kRows = 4;
constexpr int kThreads = 256;

template <typename T>
struct alignas(16) Vector {
    static constexpr int kSize = 16 / sizeof(T);
    T values[kSize];
};

// log(exp(lse)) of a side; -inf for one that saw no key.
__device__ float finite_or_nothing(float lse) { return lse == INFINITY ? -INFINITY : lse; }

template <typename T>
__device__ Vector<T> load(const MergeParams::Side& side, int64_t b, int s, int h, int vector) {
    const T* row =
        static_cast<const T*>(side.out) + b * side.out_stride_b + s * side.out_stride_s + h * side.out_stride_h;
    return reinterpret_cast<const Vector<T>*>(row)[vector];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_attn_states_kernel(const MergeParams params) {
    const int vectors = params.d_v / Vector<T>::kSize;
    const int64_t rows = params.batch * params.s_q * params.h_q;
    for (int i = threadIdx.x; i < kRows * vectors; i += kThreads) {
        const int64_t row = int64_t{blockIdx.x} * kRows + i / vectors;
        const int vector = i % vectors;
        if (row >= rows) return;
        const int h = static_cast<int>(static_cast<uint64_t>(row) % static_cast<uint64_t>(params.h_q));
        const uint64_t query = static_cast<uint64_t>(row) / static_cast<uint64_t>(params.h_q);
        const int s = static_cast<int>(query % static_cast<uint64_t>(params.s_q));
        const int64_t b = static_cast<int64_t>(query / static_cast<uint64_t>(params.s_q));

        const float lse_a = finite_or_nothing(params.a.lse[b * params.a.lse_stride_b + h * params.a.lse_stride_h + s]);
        const float lse_b = finite_or_nothing(params.b.lse[b * params.b.lse_stride_b + h * params.b.lse_stride_h + s]);
        const float high = fmaxf(lse_a, lse_b);
        const bool nothing = lse_a == -INFINITY && lse_b == -INFINITY;
        const float lse = nothing ? INFINITY : high + logf(expf(lse_a - high) + expf(lse_b - high));
        const float weight_a = lse_a == -INFINITY ? 0.f : expf(lse_a - lse);
        const float weight_b = lse_b == -INFINITY ? 0.f : expf(lse_b - lse);

        float merged[Vector<T>::kSize] = {};
        const auto add = [&](const MergeParams::Side& side, float weight) {
            if (weight == 0.f) return;
            const Vector<T> part = load<T>(side, b, s, h, vector);
#pragma unroll
            for (int k = 0; k < Vector<T>::kSize; ++k) merged[k] += weight * static_cast<float>(part.values[k]);
        };
        add(params.a, weight_a);
        add(params.b, weight_b);

        Vector<T> result;
#pragma unroll
        for (int k = 0; k < Vector<T>::kSize; ++k) result.values[k] = static_cast<T>(merged[k]);
        static_cast<Vector<T>*>(params.out)[row * vectors + vector] = result;
        if (vector == 0) params.lse[(b * params.h_q + h) * params.s_q + s] = lse;
    }
}

template <typename T>
void launch(const MergeParams& params, cudaStream_t stream) {
    const int64_t rows = params.batch * params.s_q * params.h_q;
    merge_attn_states_kernel<T><<<static_cast<unsigned>((rows + kRows - 1) / kRows), kThreads, 0, stream>>>(params);
    cuda_check(cudaGetLastError(), "merge_attn_states");
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

void merge_attn_states(const MergeParams& params, cudaStream_t stream) {
    switch (params.dtype) {
        case DType::kBF16: return launch<__nv_bfloat16>(params, stream);
        case DType::kFP16: return launch<__half>(params, stream);
        case DType::kFP32: return launch<float>(params, stream);
    }
}

}  // namespace flashmla
