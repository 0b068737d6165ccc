// CUDA errors as exceptions, which reach Python as RuntimeError.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace flashmla {

inline void cuda_check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        cudaGetLastError();  // forget it: the next call's check must not report this one
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

// Multiprocessors of the current device: what the grids that loop over their work are sized by.
inline int multiprocessors() {
    int device = 0, count = 0;
    cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

// Launches a kernel that may start while the one before it ends: it must call cudaGridDependencySynchronize() before it
// reads what that one wrote, and before it writes.
template <typename... Args>
cudaError_t launch_dependent(void (*kernel)(Args...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                             const Args&... args) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace flashmla
