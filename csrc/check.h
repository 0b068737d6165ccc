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

}  // namespace flashmla
