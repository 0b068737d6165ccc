// CUDA errors as exceptions, which reach Python as RuntimeError.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace flashmla {

inline void cuda_check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        cudaGetLastError();  // forget it: the next call's check must not report this one
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

constexpr int kMaxDevices = 64;  // whose properties are remembered

inline int current_device() {
    int device = 0;
    cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

// Multiprocessors of the current device: what the grids that loop over their work are sized by.
inline int multiprocessors() {
    static std::atomic<int> counts[kMaxDevices];  // 0: not asked yet
    const int device = current_device();
    int count = device < kMaxDevices ? counts[device].load(std::memory_order_relaxed) : 0;
    if (count == 0) {
        cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
        if (device < kMaxDevices) counts[device].store(count, std::memory_order_relaxed);
    }
    return count;
}

// Lets a kernel use so much dynamic shared memory; asks the driver once a device.
template <auto kKernel>
void allow_shared_bytes(int bytes, const char* what) {
    static std::atomic<bool> allowed[kMaxDevices];
    const int device = current_device();
    if (device < kMaxDevices && allowed[device].load(std::memory_order_relaxed)) return;
    cuda_check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), what);
    if (device < kMaxDevices) allowed[device].store(true, std::memory_order_relaxed);
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
