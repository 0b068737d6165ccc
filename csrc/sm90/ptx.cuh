// Instructions that cuda::ptx (CCCL, shipped with nvcc) lacks, one a function. Sections are those of the PTX ISA
// manual.
#pragma once

#include <cstdint>

namespace flashmla::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// This thread's lane, computed where it is asked for. "%laneid"
__device__ __forceinline__ int lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// threadIdx.x, computed where it is asked for. "%tid"
__device__ __forceinline__ int thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// blockIdx.y, once `then` is known. "%ctaid"
__device__ __forceinline__ int block_y(int then) {
    int block;
    asm("mov.u32 %0, %%ctaid.y;  // %1" : "=r"(block) : "r"(then));
    return block;
}

// x itself. What derives from it is computed here: the compiler cannot keep it in registers from an earlier time.
__device__ __forceinline__ int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// 16 bytes from global to shared memory, asynchronously. "cp.async"
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same, 8 bytes.
__device__ __forceinline__ void cp_async_8(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

// Makes a group of the thread's cp.async so far; waits until kUnderWay groups are left, the youngest.
// "cp.async.commit_group", "cp.async.wait_group"
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kUnderWay>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kUnderWay) : "memory");
}

// Waits for all of the thread's cp.async. "cp.async.wait_all"
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8. "stmatrix"
__device__ __forceinline__ void stmatrix_x4(uint32_t to, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(m0), "r"(m1),
                 "r"(m2), "r"(m3)
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t to, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(m0), "r"(m1),
                 "r"(m2), "r"(m3)
                 : "memory");
}

// The same, two matrices.
__device__ __forceinline__ void stmatrix_x2_trans(uint32_t to, uint32_t m0, uint32_t m1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(m0), "r"(m1)
                 : "memory");
}

// Four from shared memory. "ldmatrix"
__device__ __forceinline__ void ldmatrix_x4(uint32_t from, uint32_t (&m)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
}

// d [16, 8] += a [16, 16] b [8, 16]^T, of a warp, in fragments. "mma"
template <bool kBF16>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define FLASHMLA_MMA_M16N8K16(TYPE)                                            \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (kBF16) {
        FLASHMLA_MMA_M16N8K16("bf16");
    } else {
        FLASHMLA_MMA_M16N8K16("f16");
    }
#undef FLASHMLA_MMA_M16N8K16
}

// A barrier among the CTA's first arrivals of `threads` threads; barrier 0 is __syncthreads's. "bar.sync"
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Counts for a barrier that others wait at, without waiting. "bar.arrive"
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Starts to bring a line into L1, for reads to come: a read whose result nobody waits for. "ld"
__device__ __forceinline__ void load_to_l1(const int* pointer) {
    asm volatile("{ .reg .b32 unused; ld.global.b32 unused, [%0]; }" ::"l"(pointer));
}

// Brings a line into L2. "prefetch"
__device__ __forceinline__ void prefetch_l2(const void* pointer) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// Brings so many bytes into L2, both multiples of 16. "cp.async.bulk.prefetch"
__device__ __forceinline__ void prefetch_bulk_l2(const void* pointer, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(pointer), "r"(bytes));
}

// By which L2 gives up lines before others. "createpolicy"
__device__ __forceinline__ uint64_t evict_first_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Bytes to shared memory, from memory or as a box of a tensor map, by one thread; they count on the barrier `landed`.
// "cp.async.bulk", "cp.async.bulk.tensor"
__device__ __forceinline__ void copy_bulk(void* shared_to, const void* from, uint32_t bytes, uint64_t* landed,
                                          uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(shared_to)),
        "l"(from), "r"(bytes), "r"(shared_address(landed)), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void copy_box(void* shared_to, const void* map, const int32_t (&where)[5], uint64_t* landed,
                                         uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(shared_address(shared_to)),
        "l"(map), "r"(where[0]), "r"(where[1]), "r"(where[2]), "r"(where[3]), "r"(where[4]),
        "r"(shared_address(landed)), "l"(policy)
        : "memory");
}

// 16 bytes, which L2 keeps rather than others. "st", "createpolicy"
__device__ __forceinline__ void store_evict_last(uint4* to, const uint4& value) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w), "l"(policy)
                 : "memory");
}

// Brings a box of a tensor into L2. "cp.async.bulk.prefetch.tensor"
__device__ __forceinline__ void prefetch_box_l2(const void* map, const int32_t (&where)[5]) {
    asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(map),
                 "r"(where[0]), "r"(where[1]), "r"(where[2]), "r"(where[3]), "r"(where[4])
                 : "memory");
}

// Hands a warpgroup's registers back, or takes more of them. "setmaxnreg"
template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 2^x to 2 ulp; 0 at -inf. "ex2"
__device__ __forceinline__ float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Four bytes of `low` and `high`, numbered 0 to 7: nibble i of the selector names byte i, + 8 its sign eight times.
// "prmt", whose signs __byte_perm does not give.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

// The lower or upper two of four e4m3 values in fp16. "cvt"
template <int kHalf>
__device__ __forceinline__ uint32_t fp16_of_e4m3(uint32_t word) {
    uint32_t result;
    if constexpr (kHalf == 0) {
        asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}\n"
            : "=r"(result)
            : "r"(word));
    } else {
        asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}\n"
            : "=r"(result)
            : "r"(word));
    }
    return result;
}

// 4 bytes from global memory; 16 bytes, or zeros; and 16 bytes to shared memory. Volatile, that is in the order of the
// program: ptxas gathers other loads where their registers are needed least, far from where they were asked for. "ld",
// "st"
__device__ __forceinline__ float load_in_order(const void* from) {
    float result;
    asm volatile("ld.volatile.global.b32 %0, [%1];" : "=f"(result) : "l"(from));
    return result;
}
__device__ __forceinline__ uint4 load_in_order(const void* from, bool there) {
    uint4 result;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.volatile.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}\n"
        : "=&r"(result.x), "=&r"(result.y), "=&r"(result.z), "=&r"(result.w)
        : "l"(from), "r"(static_cast<int>(there)));
    return result;
}
__device__ __forceinline__ void store_in_order(uint32_t to, const uint4& values) {
    asm volatile("st.volatile.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(values.x), "r"(values.y),
                 "r"(values.z), "r"(values.w)
                 : "memory");
}

// Brings a tensor map into the descriptor cache. "prefetch.tensormap"
__device__ __forceinline__ void prefetch_tensor_map(const void* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace flashmla::ptx
