// paged_stream: the ceiling of the benchmark. Pulls the listed pages of a cache into shared memory and does nothing
// else: what a decode kernel would take whose arithmetic cost nothing.
//
// Grid: one CTA a multiprocessor, each with a contiguous, equal share of the list, in pieces of at most 72 KB (a page
// of 64 tokens of 576 bf16 values), three of them in flight. One thread works: cp.async.bulk needs no more.

#include <cuda/ptx>

#include "../check.h"
#include "../params.h"
#include "ptx.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kPieceBytes = 72 * 1024;
constexpr int kInFlight = 3;
constexpr int kSharedBytes = kInFlight * kPieceBytes;

__device__ void wait(uint64_t* barrier, uint32_t phase) {
    while (!cuda::ptx::mbarrier_try_wait_parity(barrier, phase)) {
    }
}

__global__ void __launch_bounds__(32, 1) paged_stream_kernel(const StreamParams params) {
    extern __shared__ __align__(128) uint8_t pieces[];  // [kInFlight, kPieceBytes]
    __shared__ uint64_t landed[kInFlight];
    if (threadIdx.x != 0) return;
    for (int i = 0; i < kInFlight; ++i) cuda::ptx::mbarrier_init(&landed[i], 1);
    cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);

    const int per_page = (params.page_bytes + kPieceBytes - 1) / kPieceBytes;
    const int64_t total = int64_t{params.n} * per_page;
    const int64_t begin = total * blockIdx.x / gridDim.x, end = total * (blockIdx.x + 1) / gridDim.x;
    const auto load = [&](int64_t piece) {
        const int stage = (piece - begin) % kInFlight;
        const int page = params.pages[piece / per_page];
        const int offset = static_cast<int>(piece % per_page) * kPieceBytes;
        const bool exists = page >= 0 && page < params.num_pages;
        const uint32_t bytes = exists ? min(kPieceBytes, params.page_bytes - offset) : 0;
        cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared,
                                             &landed[stage], bytes);
        if (!exists) return;
        const uint8_t* from = static_cast<const uint8_t*>(params.kv_cache) + int64_t{page} * params.page_bytes + offset;
        cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_global, pieces + stage * kPieceBytes, from,
                                 bytes, &landed[stage]);
    };
    for (int64_t piece = begin; piece < end && piece < begin + kInFlight; ++piece) load(piece);
    for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t i = piece - begin;
        wait(&landed[i % kInFlight], (i / kInFlight) & 1);
        if (piece + kInFlight < end) load(piece + kInFlight);
    }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- launcher

void paged_stream(const StreamParams& params, cudaStream_t stream) {
    allow_shared_bytes<paged_stream_kernel>(kSharedBytes, "paged_stream: shared memory");
    paged_stream_kernel<<<multiprocessors(), 32, kSharedBytes, stream>>>(params);
    cuda_check(cudaGetLastError(), "paged_stream");
}

}  // namespace flashmla::sm90
