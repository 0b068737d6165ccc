// Faults that compute-sanitizer's tools must find, for tests/sanitize.py: a tool that sees none of these would not see
// ours either.
//
//   faults overrun     writes past the end of a buffer                         memcheck
//   faults race        reads what another warp stores, with no barrier between racecheck
//   faults unwritten   reads global memory that nobody wrote                   initcheck
//   faults divergent   a thread waits at a warp's barrier that does not name it synccheck
//   faults clean       the same kernels without their faults; exits with 0 if their results are right
//
// Each kernel copies kThreads ints, one a thread.

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
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

int main(int argc, char** argv) {
    const char* fault = argc == 2 ? argv[1] : "";
    const bool overrun = !strcmp(fault, "overrun"), race = !strcmp(fault, "race"),
               unwritten = !strcmp(fault, "unwritten"), divergent = !strcmp(fault, "divergent");
    if (!overrun && !race && !unwritten && !divergent && strcmp(fault, "clean")) {
        fprintf(stderr, "usage: faults overrun|race|unwritten|divergent|clean\n");
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
