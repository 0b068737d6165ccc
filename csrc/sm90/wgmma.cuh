// The wgmma shapes in use, and the shared-memory descriptors they take. PTX ISA, "Asynchronous Warpgroup Level Matrix
// Instructions".
//
// Every operand lies in slices of 64 x 64 16-bit values, or fewer rows: rows of 128 bytes, 8 KB, aligned to 1024 bytes,
// in the 128-byte swizzle (the 16-byte chunk c of row r stands at place c ^ (r % 8)), as TMA writes it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace flashmla::wgmma {

constexpr int kSliceBytes = 64 * 128;

// Byte offset of a 16-byte chunk in a slice.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// -------------------------------------------------------------------------------------------------------- descriptors
// Bits 0-13 address, 16-29 leading byte offset, 32-45 stride byte offset (each / 16), 62-63 swizzle mode, 1 = 128
// bytes. In a cluster a CTA's shared addresses have its rank in higher bits, which must not get into the offsets.

__device__ __forceinline__ uint64_t descriptor(const void* slice, int leading_bytes, int stride_bytes) {
    return (uint64_t{1} << 62) | (static_cast<uint64_t>(stride_bytes >> 4) << 32) |
           (static_cast<uint64_t>(leading_bytes >> 4) << 16) | (ptx::shared_address(slice) >> 4 & 0x3fff);
}

// An operand whose reduced dimension runs along the 64 values of a slice's rows: a step of 16 of them is 32 bytes.
// Groups of 8 rows are 1024 bytes apart; the leading offset is not used.
__device__ __forceinline__ uint64_t k_major(const void* slice) { return descriptor(slice, 16, 1024); }
constexpr int kStepBytesKMajor = 32;

// The same of slices of 64 bytes a row in the 64-byte swizzle (the 16-byte chunk c of row r stands at place c ^ (r / 2
// % 4)), with groups of 8 rows 512 bytes apart.
__device__ __forceinline__ uint64_t k_major_64(const void* slice) {
    return descriptor(slice, 16, 512) ^ (uint64_t{3} << 62);  // swizzle mode 2
}

// An operand whose reduced dimension runs along a slice's 64 rows: a step of 16 of them is 2048 bytes. The next 8 rows
// are 1024 bytes away, the next 64 columns one slice.
__device__ __forceinline__ uint64_t mn_major(const void* slice) { return descriptor(slice, kSliceBytes, 1024); }
constexpr int kStepBytesMNMajor = 2048;

__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// -------------------------------------------------------------------------------------------------------------- order

// Before the first wgmma that reads or accumulates into registers written otherwise.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from touching registers that a wgmma may still use: call it after wait().
template <int kCount>
__device__ __forceinline__ void keep(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void keep(uint32_t (&a)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// ------------------------------------------------------------------------------------------------------------- shapes

#define FLASHMLA_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLASHMLA_16(d, i) FLASHMLA_4(d, i), FLASHMLA_4(d, i + 4), FLASHMLA_4(d, i + 8), FLASHMLA_4(d, i + 12)

#define FLASHMLA_WGMMA_M64N16K16(TYPE, TRANSPOSED)                                    \
    asm volatile(                                                                     \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"                                  \
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE                   \
        " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, " TRANSPOSED ", 0;\n}\n" \
        : FLASHMLA_4(d, 0), FLASHMLA_4(d, 4)                                          \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

#define FLASHMLA_WGMMA_M64N32K16(TYPE, TRANSPOSED)                                                                \
    asm volatile(                                                                                                 \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                                              \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                               \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, " TRANSPOSED \
        ", 0;\n}\n"                                                                                               \
        : FLASHMLA_16(d, 0)                                                                                       \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

#define FLASHMLA_WGMMA_M64N64K16(TYPE)                                                       \
    asm volatile(                                                                            \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                         \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                          \
        " "                                                                                  \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"             \
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
        "%32, %33, p, 1, 1, 0, 0;\n}\n"                                                      \
        : FLASHMLA_16(d, 0), FLASHMLA_16(d, 16)                                              \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

#define FLASHMLA_WGMMA_M64N256K16(TYPE)                                                                      \
    asm volatile(                                                                                            \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                        \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                         \
        " "                                                                                                  \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                             \
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"                   \
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"                   \
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"                   \
        " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"                   \
        " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"                   \
        " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111,"       \
        " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
        "%128, %129, p, 1, 1, 0, 1;\n}\n"                                                                    \
        : FLASHMLA_16(d, 0), FLASHMLA_16(d, 16), FLASHMLA_16(d, 32), FLASHMLA_16(d, 48), FLASHMLA_16(d, 64), \
          FLASHMLA_16(d, 80), FLASHMLA_16(d, 96), FLASHMLA_16(d, 112)                                        \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

#define FLASHMLA_WGMMA_M64N256K16_RS(TYPE)                                                                   \
    asm volatile(                                                                                            \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\n"                                                        \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                         \
        " "                                                                                                  \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                             \
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"                   \
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"                   \
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63,"                   \
        " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79,"                   \
        " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"                   \
        " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111,"       \
        " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
        "{%128, %129, %130, %131}, %132, p, 1, 1, 1;\n}\n"                                                   \
        : FLASHMLA_16(d, 0), FLASHMLA_16(d, 16), FLASHMLA_16(d, 32), FLASHMLA_16(d, 48), FLASHMLA_16(d, 64), \
          FLASHMLA_16(d, 80), FLASHMLA_16(d, 96), FLASHMLA_16(d, 112)                                        \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)))

// d [64, kN] = a [64, 16] b [kN, 16]^T (+ d), kN 16 or 32: both operands in shared memory, b K-major, a too or, if
// kMNMajor, MN-major.
#define FLASHMLA_ALL_TYPES(WGMMA)                                 \
    if constexpr (std::is_same_v<T, __nv_bfloat16> && kMNMajor) { \
        WGMMA("bf16", "1");                                       \
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {      \
        WGMMA("bf16", "0");                                       \
    } else if constexpr (kMNMajor) {                              \
        WGMMA("f16", "1");                                        \
    } else {                                                      \
        WGMMA("f16", "0");                                        \
    }
template <typename T, bool kMNMajor>
__device__ __forceinline__ void m64k16(float (&d)[8], uint64_t a, uint64_t b, bool accumulate) {
    FLASHMLA_ALL_TYPES(FLASHMLA_WGMMA_M64N16K16)
}
template <typename T, bool kMNMajor>
__device__ __forceinline__ void m64k16(float (&d)[16], uint64_t a, uint64_t b, bool accumulate) {
    FLASHMLA_ALL_TYPES(FLASHMLA_WGMMA_M64N32K16)
}

// d [64, 64] = a [64, 16] b [64, 16]^T (+ d): both operands in shared memory, K-major.
template <typename T>
__device__ __forceinline__ void m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        FLASHMLA_WGMMA_M64N64K16("bf16");
    } else {
        FLASHMLA_WGMMA_M64N64K16("f16");
    }
}

// d [64, 64] = a [64, 32] b [64, 32]^T (+ d) of e4m3: both operands in shared memory, K-major.
__device__ __forceinline__ void m64n64k32_e4m3(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1;\n}\n"
        : FLASHMLA_16(d, 0), FLASHMLA_16(d, 16)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

// d [64, 256] = a [64, 16] b [16, 256] (+ d): both operands in shared memory, a K-major, b MN-major.
template <typename T>
__device__ __forceinline__ void m64n256k16(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        FLASHMLA_WGMMA_M64N256K16("bf16");
    } else {
        FLASHMLA_WGMMA_M64N256K16("f16");
    }
}

// The same with a in registers, in the layout of accumulators packed in pairs: a[0], a[1] hold the thread's two rows of
// columns 0-7, a[2], a[3] of columns 8-15.
template <typename T>
__device__ __forceinline__ void m64n256k16(float (&d)[128], const uint32_t* a, uint64_t b, bool accumulate) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        FLASHMLA_WGMMA_M64N256K16_RS("bf16");
    } else {
        FLASHMLA_WGMMA_M64N256K16_RS("f16");
    }
}

#undef FLASHMLA_WGMMA_M64N256K16_RS
#undef FLASHMLA_WGMMA_M64N256K16
#undef FLASHMLA_WGMMA_M64N64K16
#undef FLASHMLA_WGMMA_M64N32K16
#undef FLASHMLA_WGMMA_M64N16K16
#undef FLASHMLA_ALL_TYPES
#undef FLASHMLA_16
#undef FLASHMLA_4

}  // namespace flashmla::wgmma
