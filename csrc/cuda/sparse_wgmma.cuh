// wgmma.mma_async.sp on sm_90a: D[64, N] += A[64, 64] (2:4, shared memory) * B[64, N] (shared memory), e4m3 in, f32
// out. One overload per N; the register lists are the instruction's own and cannot be shorter.
#pragma once

#include <cstdint>

namespace vllm_sparse::wgmma {

// Keeps the compiler from moving accumulator accesses over the start of a batch.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Shared-memory operand descriptors. Offsets are in bytes.
//   plain: 8 rows x 16 bytes stored as one run of 128 bytes; `k_offset` and `row_offset` step to the next such run.
//   swizzled_128: 8 rows of 128 bytes, 16-byte chunks XORed with the row; 1024 bytes a run.
__device__ __forceinline__ uint64_t plain_descriptor(uint32_t address, uint32_t k_offset, uint32_t row_offset) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(k_offset >> 4) << 16 | uint64_t(row_offset >> 4) << 32;
}

__device__ __forceinline__ uint64_t swizzled_128_descriptor(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#define VLLM_SPARSE_D8(i)                                                                                       \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define VLLM_SPARSE_D32(i) VLLM_SPARSE_D8(i), VLLM_SPARSE_D8(i + 8), VLLM_SPARSE_D8(i + 16), VLLM_SPARSE_D8(i + 24)

// `metadata`: this thread's word of the 64 x 64 block's positions.
__device__ __forceinline__ void multiply(float (&d)[4], uint64_t a, uint64_t b, uint32_t metadata) {
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.m64n8k64.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3"
        "}, %4, %5, %6, 0, 1, 1, 1;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "l"(a), "l"(b), "r"(metadata));
}

__device__ __forceinline__ void multiply(float (&d)[8], uint64_t a, uint64_t b, uint32_t metadata) {
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.m64n16k64.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, %8, %9, %10, 0, 1, 1, 1;"
        : VLLM_SPARSE_D8(0)
        : "l"(a), "l"(b), "r"(metadata));
}

__device__ __forceinline__ void multiply(float (&d)[16], uint64_t a, uint64_t b, uint32_t metadata) {
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.m64n32k64.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, %18, 0, 1, 1, 1;"
        : VLLM_SPARSE_D8(0), VLLM_SPARSE_D8(8)
        : "l"(a), "l"(b), "r"(metadata));
}

__device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, uint32_t metadata) {
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.m64n64k64.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, %34, 0, 1, 1, 1;"
        : VLLM_SPARSE_D32(0)
        : "l"(a), "l"(b), "r"(metadata));
}

__device__ __forceinline__ void multiply(float (&d)[48], uint64_t a, uint64_t b, uint32_t metadata) {
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.m64n96k64.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        "}, %48, %49, %50, 0, 1, 1, 1;"
        : VLLM_SPARSE_D32(0), VLLM_SPARSE_D8(32), VLLM_SPARSE_D8(40)
        : "l"(a), "l"(b), "r"(metadata));
}

__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, uint32_t metadata) {
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.m64n128k64.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, %66, 0, 1, 1, 1;"
        : VLLM_SPARSE_D32(0), VLLM_SPARSE_D32(32)
        : "l"(a), "l"(b), "r"(metadata));
}

__device__ __forceinline__ void multiply(float (&d)[96], uint64_t a, uint64_t b, uint32_t metadata) {
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.m64n192k64.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
        "}, %96, %97, %98, 0, 1, 1, 1;"
        : VLLM_SPARSE_D32(0), VLLM_SPARSE_D32(32), VLLM_SPARSE_D32(64)
        : "l"(a), "l"(b), "r"(metadata));
}

__device__ __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t b, uint32_t metadata) {
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.m64n256k64.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, %128, %129, %130, 0, 1, 1, 1;"
        : VLLM_SPARSE_D32(0), VLLM_SPARSE_D32(32), VLLM_SPARSE_D32(64), VLLM_SPARSE_D32(96)
        : "l"(a), "l"(b), "r"(metadata));
}

#undef VLLM_SPARSE_D8
#undef VLLM_SPARSE_D32

}  // namespace vllm_sparse::wgmma
