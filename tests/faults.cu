// Faults that compute-sanitizer's tools must find, for tests/sanitize.py: a tool that sees none of these would not see
// ours either.
//
//   faults overrun     writes past the end of a buffer                         memcheck
//   faults race        reads what another warp stores, with no barrier between racecheck
//   faults unwritten   reads global memory that nobody wrote                   initcheck
//   faults divergent   a thread waits at a warp's barrier that does not name it synccheck
//   faults clean       the same kernels without their faults; exits with 0 if their results are right
//
// Each of these kernels copies kThreads ints, one a thread. And what has no fault, though racecheck reports one:
//
//   faults handover    values handed from one group of threads to another; exits with 0 if they arrive

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cuda/ptx>
#include <vector>

constexpr int kThreads = 256;
constexpr size_t kBytes = kThreads * sizeof(int);

__global__ void copy_kernel(int* to, const int* from, int n) {
    const int i = threadIdx.x;
    if (i < n) to[i] = from[i];
}

template <bool kWaits>
__global__ void reverse_kernel(int* to, const int* from) {
    __shared__ int shared[kThreads];
    const int i = threadIdx.x;
    shared[i] = from[i];
    if (kWaits) __syncthreads();
    to[i] = shared[kThreads - 1 - i];
}

// Threads of a warp up to `last_waiting` wait for those below 16: at 16, one too many.
__global__ void barrier_kernel(int* to, const int* from, int last_waiting) {
    __shared__ int shared[kThreads];
    const int i = threadIdx.x, lane = i % 32;
    shared[i] = from[i];
    const unsigned named = __ballot_sync(~0u, lane < 16);
    if (lane <= last_waiting) __syncwarp(named);
    __syncthreads();
    to[i] = shared[i ^ 1];
}

// Group 0 leaves a value a thread, and group 1 takes them, each thread another one's; kRounds times through the same
// memory. They wait as the decode kernel's warpgroups do (csrc/sm90/fwd_kvcache_mla.cu).
constexpr int kGroup = 128, kRounds = 16;
enum Barrier { kLeft = 1, kTaken, kAllTook };  // named ones; 0 is __syncthreads's

__device__ void bar_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ void bar_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ void wait(uint64_t* barrier, uint32_t phase) {
    while (!cuda::ptx::mbarrier_try_wait_parity(barrier, phase)) {
    }
}

__device__ __forceinline__ void leave_value(int (&shared)[kGroup], int t, int value) { shared[t] = value; }

__device__ __forceinline__ int take_value(const int (&shared)[kGroup], int t) { return shared[(t + 1) % kGroup]; }

// Why no round's accesses can meet another's:
// - A round's values are left before the barrier kLeft is arrived at, and taken behind it. An arrival orders what came
//   before it for those who wait, like a wait does.
// - They are taken before the way back begins, and the next ones are left behind its end. With kNamed that is one named
//   barrier: both ways together are the PTX manual's example of bar.arrive, a producer and a consumer. Else all of
//   group 1 meets, one lane a warp arrives at `freed`, a third group's thread waits for that and arrives at `landed`,
//   and group 0 waits for that. Arrivals release and waits acquire, so the order holds through all of them.
// - Nobody is a round ahead at any barrier: group 0 begins none before the way back has ended, which needs group 1 to
//   have passed kLeft; group 1 passes the next kLeft only when group 0 has passed the way back. The third group's
//   thread waits for each phase of `freed`, and the next one needs its arrival at `landed`.
// - Nobody leaves an arrival behind: all that arrive are waited for in the same round.
template <bool kNamed>
__global__ void handover_kernel(int* to, const int* from) {
    __shared__ int shared[kGroup];
    __shared__ uint64_t freed, landed;
    const int group = threadIdx.x / kGroup, t = threadIdx.x % kGroup;
    if (threadIdx.x == 0) {
        cuda::ptx::mbarrier_init(&freed, kGroup / 32);
        cuda::ptx::mbarrier_init(&landed, 1);
    }
    __syncthreads();
    for (int round = 0; round < kRounds; ++round) {
        const uint32_t phase = round % 2;
        if (group == 0) {
            leave_value(shared, t, from[round * kGroup + t]);
            bar_arrive(kLeft, 2 * kGroup);
            kNamed ? bar_sync(kTaken, 2 * kGroup) : wait(&landed, phase);
        } else if (group == 1) {
            bar_sync(kLeft, 2 * kGroup);
            to[round * kGroup + t] = take_value(shared, t);
            if (kNamed) {
                bar_arrive(kTaken, 2 * kGroup);
            } else {
                bar_sync(kAllTook, kGroup);
                if (t % 32 == 0) cuda::ptx::mbarrier_arrive(&freed);
            }
        } else if (t == 0) {
            wait(&freed, phase);
            cuda::ptx::mbarrier_arrive(&landed);
        }
        __syncwarp();  // named barriers want whole warps
    }
}

__device__ __forceinline__ void leave_chunk(int (&shared)[kGroup], int t, int value) { shared[t] = value; }

__device__ __forceinline__ int take_chunk(const int (&shared)[kGroup], int t) { return shared[(t + 1) % kGroup]; }

// The same by two mbarriers alone, as queries come to warps of csrc/sm90/fwd_kvcache_mla_fp8_few_rows.cu. Each warp has
// left or taken its values before its first lane arrives, which __syncwarp orders after all of the warp's accesses;
// arrivals release and waits acquire. Nobody is a phase ahead, since each waits for the other's last one.
__global__ void mbarrier_handover_kernel(int* to, const int* from) {
    __shared__ int shared[kGroup];
    __shared__ uint64_t freed, landed;
    const int group = threadIdx.x / kGroup, t = threadIdx.x % kGroup;
    if (threadIdx.x == 0) {
        cuda::ptx::mbarrier_init(&freed, kGroup / 32);
        cuda::ptx::mbarrier_init(&landed, kGroup / 32);
    }
    __syncthreads();
    for (int round = 0; round < kRounds; ++round) {
        const uint32_t phase = round % 2;
        if (group == 0) {
            wait(&freed, phase ^ 1);
            leave_chunk(shared, t, from[round * kGroup + t]);
        } else {
            wait(&landed, phase);
            to[round * kGroup + t] = take_chunk(shared, t);
        }
        __syncwarp();
        if (t % 32 == 0) cuda::ptx::mbarrier_arrive(group == 0 ? &landed : &freed);
    }
}

// Not cuda::ptx's: the report is to name this file.
__device__ __forceinline__ void copy_chunk(int* shared_to, const int* from, uint32_t bytes, uint64_t* landed) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(shared_to))),
                 "l"(from), "r"(bytes), "r"(static_cast<uint32_t>(__cvta_generic_to_shared(landed)))
                 : "memory");
}

// The same where values come by bulk copies, one a lane, as rows of a strided cache come to the ring of
// csrc/sm90/e4m3_tile.cuh: the copies complete `landed`, and each lane that starts one has waited for `freed` itself.
__global__ void bulk_handover_kernel(int* to, const int* from) {
    __shared__ alignas(16) int shared[kGroup];
    __shared__ uint64_t freed, landed;
    constexpr uint32_t kCopyBytes = sizeof(shared) / 32;
    const int group = threadIdx.x / kGroup, t = threadIdx.x % kGroup;
    if (threadIdx.x == 0) {
        cuda::ptx::mbarrier_init(&freed, kGroup / 32);
        cuda::ptx::mbarrier_init(&landed, 1);
        cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
    }
    __syncthreads();
    for (int round = 0; round < kRounds; ++round) {
        const uint32_t phase = round % 2;
        if (group == 1) {
            wait(&landed, phase);
            to[round * kGroup + t] = take_chunk(shared, t);
            __syncwarp();
            if (t % 32 == 0) cuda::ptx::mbarrier_arrive(&freed);
        } else if (t < 32) {
            wait(&freed, phase ^ 1);
            if (t == 0) {
                cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta,
                                                     cuda::ptx::space_shared, &landed, sizeof(shared));
            }
            __syncwarp();
            const int first = t * kGroup / 32;
            copy_chunk(shared + first, from + round * kGroup + first, kCopyBytes, &landed);
        }
    }
}

int run_handovers() {
    constexpr size_t kAllBytes = kRounds * kGroup * sizeof(int);
    std::vector<int> values(kRounds * kGroup), taken(kRounds * kGroup);
    for (int i = 0; i < kRounds * kGroup; ++i) values[i] = 7 * i;
    int *from, *to;
    cudaMalloc(&from, kAllBytes);
    cudaMemcpy(from, values.data(), kAllBytes, cudaMemcpyHostToDevice);
    cudaMalloc(&to, kAllBytes);
    for (const int kind : {0, 1, 2, 3}) {
        cudaMemset(to, -1, kAllBytes);
        if (kind == 0) handover_kernel<false><<<1, 2 * kGroup + 32>>>(to, from);
        if (kind == 1) handover_kernel<true><<<1, 2 * kGroup>>>(to, from);
        if (kind == 2) mbarrier_handover_kernel<<<1, 2 * kGroup>>>(to, from);
        if (kind == 3) bulk_handover_kernel<<<1, 2 * kGroup>>>(to, from);
        if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
            fprintf(stderr, "handover: %s\n", cudaGetErrorString(error));
            return 1;
        }
        cudaMemcpy(taken.data(), to, kAllBytes, cudaMemcpyDeviceToHost);
        for (int i = 0; i < kRounds * kGroup; ++i) {
            if (taken[i] != values[i / kGroup * kGroup + (i + 1) % kGroup]) {
                fprintf(stderr, "handover: a wrong value at %d\n", i);
                return 1;
            }
        }
    }
    for (int* buffer : {from, to}) cudaFree(buffer);
    printf("4 cases right\n");
    return 0;
}

int main(int argc, char** argv) {
    const char* fault = argc == 2 ? argv[1] : "";
    if (!strcmp(fault, "handover")) return run_handovers();
    const bool overrun = !strcmp(fault, "overrun"), race = !strcmp(fault, "race"),
               unwritten = !strcmp(fault, "unwritten"), divergent = !strcmp(fault, "divergent");
    if (!overrun && !race && !unwritten && !divergent && strcmp(fault, "clean")) {
        fprintf(stderr, "usage: faults overrun|race|unwritten|divergent|clean|handover\n");
        return 2;
    }

    std::vector<int> values(2 * kThreads), copied(kThreads), reversed(kThreads), swapped(kThreads);
    for (int i = 0; i < 2 * kThreads; ++i) values[i] = 7 * i;
    int *from, *to[3];
    cudaMalloc(&from, 2 * kBytes);
    cudaMemcpy(from, values.data(), unwritten ? kBytes / 2 : 2 * kBytes, cudaMemcpyHostToDevice);
    for (int*& buffer : to) cudaMalloc(&buffer, kBytes);
    int* small = nullptr;  // its last int lies past its end, and in no other buffer
    cudaMalloc(&small, kBytes - sizeof(int));

    copy_kernel<<<1, 2 * kThreads>>>(overrun ? small : to[0], from, kThreads);
    race ? reverse_kernel<false><<<1, kThreads>>>(to[1], from) : reverse_kernel<true><<<1, kThreads>>>(to[1], from);
    barrier_kernel<<<1, kThreads>>>(to[2], from, divergent ? 16 : 15);

    cudaMemcpy(copied.data(), to[0], kBytes, cudaMemcpyDeviceToHost);
    cudaMemcpy(reversed.data(), to[1], kBytes, cudaMemcpyDeviceToHost);
    cudaMemcpy(swapped.data(), to[2], kBytes, cudaMemcpyDeviceToHost);
    for (int* buffer : {from, to[0], to[1], to[2], small}) cudaFree(buffer);
    if (strcmp(fault, "clean")) return 0;  // what a fault computes means nothing

    if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
        fprintf(stderr, "clean: %s\n", cudaGetErrorString(error));
        return 1;
    }
    for (int i = 0; i < kThreads; ++i) {
        if (copied[i] != 7 * i || reversed[i] != 7 * (kThreads - 1 - i) || swapped[i] != 7 * (i ^ 1)) {
            fprintf(stderr, "clean: a wrong value at %d\n", i);
            return 1;
        }
    }
    return 0;
}
