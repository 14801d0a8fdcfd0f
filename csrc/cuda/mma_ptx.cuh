// Thin names for the PTX instructions of sm_80 and later that C++ has no words for. No logic lives here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace vllm_sparse::ptx {

// ---- copies in the background, by this thread
// ------------------------------------------------------------------------ Copies the first `bytes` (0 ... 16) of 16
// bytes and fills up with zeros.
__device__ __forceinline__ void copy_async_16(uint32_t destination, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns once at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The same word, of which the compiler no longer knows how it was made: it stays in its register.
__device__ __forceinline__ uint32_t keep(uint32_t word) {
    asm volatile("" : "+r"(word));
    return word;
}

// ---- shared memory by 32-bit addresses
// -------------------------------------------------------------------------------
__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

// ---- fragments ------------------------------------------------------------------------------------------------------
// Four 8x8 matrices of 16-bit values: lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ uint32_t transpose_matrix(uint32_t fragment) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
    return result;
}

// ---- d += a * b, a [16, 2:4 sparse], b [.., 8 columns]
// --------------------------------------------------------------- 16-bit operands: k32; the words of lanes t = 0, 1
// (kSelector 0) or 2, 3 (1) of every four hold the positions. 8-bit operands: k64; all lanes' words do.
#define VLLM_SPARSE_MMA_SP(shape, types, constraint, selector)                                             \
    asm volatile("mma.sp::ordered_metadata.sync.aligned." shape ".row.col." types                          \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"    \
                 : constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3])                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), \
                   "r"(positions), "n"(selector))

__device__ __forceinline__ void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                           uint32_t positions, int selector, __nv_bfloat16) {
    if (selector == 0) {
        VLLM_SPARSE_MMA_SP("m16n8k32", "f32.bf16.bf16.f32", "+f", 0);
    } else {
        VLLM_SPARSE_MMA_SP("m16n8k32", "f32.bf16.bf16.f32", "+f", 1);
    }
}

__device__ __forceinline__ void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                           uint32_t positions, int selector, __half) {
    if (selector == 0) {
        VLLM_SPARSE_MMA_SP("m16n8k32", "f32.f16.f16.f32", "+f", 0);
    } else {
        VLLM_SPARSE_MMA_SP("m16n8k32", "f32.f16.f16.f32", "+f", 1);
    }
}

__device__ __forceinline__ void mma_sparse(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                           uint32_t positions, int, int8_t) {
    VLLM_SPARSE_MMA_SP("m16n8k64", "s32.s8.s8.s32", "+r", 0);
}

// Compute capability 8.9 and later; before, the host never launches a kernel with it.
__device__ __forceinline__ void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                           uint32_t positions, int, __nv_fp8_e4m3) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    VLLM_SPARSE_MMA_SP("m16n8k64", "f32.e4m3.e4m3.f32", "+f", 0);
#endif
}

#undef VLLM_SPARSE_MMA_SP

// ---- other blocks ---------------------------------------------------------------------------------------------------
__device__ __forceinline__ int add_acquire_release(int* counter, int value) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
    return before;
}

}  // namespace vllm_sparse::ptx
