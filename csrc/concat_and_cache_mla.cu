// concat_and_cache_mla: kv_cache[slot[t] / page_size, slot[t] % page_size, 0] = [kv_c[t], k_pe[t]] for every token t.
//
// It only moves bytes, in vectors of 16, so it needs no dtype. A slot outside the cache (-1: skip) writes nothing.
// Grid: one CTA per kTokens tokens; the bf16 row of 512 + 64 values has 72 vectors, so 4 tokens keep 288 threads busy
// with one load each, and 7 CTAs fill a multiprocessor. Any architecture.

#include "check.h"
#include "params.h"

namespace flashmla {
namespace {

constexpr int kTokens = 4;
constexpr int kThreads = 288;

__global__ void __launch_bounds__(kThreads) concat_and_cache_mla_kernel(const AppendParams params) {
    const int vectors = params.kv_c_vectors + params.k_pe_vectors;
    const int64_t first = int64_t{blockIdx.x} * kTokens;
    for (int i = threadIdx.x; i < kTokens * vectors; i += kThreads) {
        const int64_t token = first + i / vectors;
        const int vector = i % vectors;
        if (token >= params.n) return;
        const int64_t slot = params.slot_mapping[token];
        if (slot < 0 || slot >= params.num_slots) continue;
        const uint64_t page = static_cast<uint64_t>(slot) / static_cast<uint64_t>(params.page_size);
        const int64_t offset = slot - static_cast<int64_t>(page) * params.page_size;
        const int4* from =
            vector < params.kv_c_vectors
                ? static_cast<const int4*>(params.kv_c) + token * params.kv_c_stride + vector
                : static_cast<const int4*>(params.k_pe) + token * params.k_pe_stride + (vector - params.kv_c_vectors);
        int4* to = static_cast<int4*>(params.kv_cache) + static_cast<int64_t>(page) * params.page_stride +
                   offset * params.token_stride + vector;
        *to = __ldg(from);
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

void concat_and_cache_mla(const AppendParams& params, cudaStream_t stream) {
    const int64_t blocks = (params.n + kTokens - 1) / kTokens;
    concat_and_cache_mla_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params);
    cuda_check(cudaGetLastError(), "concat_and_cache_mla");
}

}  // namespace flashmla
