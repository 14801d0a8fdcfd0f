// wgmma.mma_async.sp on sm_90a: D[64, N] += A[64, k] (2:4) * B[k, N], both in shared memory; k is 64 bytes of B: 64
// columns of 8 bits or 32 of 16. One overload per element type and N.
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

// Element types. Positions are 4 bits per group of 4 columns: k = 64 fills one word in each of the 128 threads, k = 32
// one in half of them, which the instruction's selector names.
struct E4m3 {
    using Sum = float;
    static constexpr int BYTES = 1;
};
struct Int8 {
    using Sum = int;
    static constexpr int BYTES = 1;
};
struct BFloat16 {
    using Sum = float;
    static constexpr int BYTES = 2;
};
struct Float16 {
    using Sum = float;
    static constexpr int BYTES = 2;
};

// The register lists are the instruction's own and cannot be shorter.
#define VLLM_SPARSE_R4 "%0, %1, %2, %3"
#define VLLM_SPARSE_R8 \
    VLLM_SPARSE_R4     \
    ", %4, %5, %6, %7"
#define VLLM_SPARSE_R16 \
    VLLM_SPARSE_R8      \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define VLLM_SPARSE_R32 \
    VLLM_SPARSE_R16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define VLLM_SPARSE_R48 \
    VLLM_SPARSE_R32     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define VLLM_SPARSE_R64 \
    VLLM_SPARSE_R48     \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VLLM_SPARSE_R72 \
    VLLM_SPARSE_R64     \
    ", %64, %65, %66, %67, %68, %69, %70, %71"
#define VLLM_SPARSE_R80 \
    VLLM_SPARSE_R72     \
    ", %72, %73, %74, %75, %76, %77, %78, %79"
#define VLLM_SPARSE_R96 \
    VLLM_SPARSE_R80     \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define VLLM_SPARSE_R128                                                                           \
    VLLM_SPARSE_R96                                                                                \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define VLLM_SPARSE_D4(kind, i) kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3])
#define VLLM_SPARSE_D8(kind, i) VLLM_SPARSE_D4(kind, i), VLLM_SPARSE_D4(kind, i + 4)
#define VLLM_SPARSE_D16(kind, i) VLLM_SPARSE_D8(kind, i), VLLM_SPARSE_D8(kind, i + 8)
#define VLLM_SPARSE_D32(kind, i) VLLM_SPARSE_D16(kind, i), VLLM_SPARSE_D16(kind, i + 16)
#define VLLM_SPARSE_D48(kind, i) VLLM_SPARSE_D32(kind, i), VLLM_SPARSE_D16(kind, i + 32)
#define VLLM_SPARSE_D64(kind, i) VLLM_SPARSE_D32(kind, i), VLLM_SPARSE_D32(kind, i + 32)
#define VLLM_SPARSE_D72(kind, i) VLLM_SPARSE_D64(kind, i), VLLM_SPARSE_D8(kind, i + 64)
#define VLLM_SPARSE_D80(kind, i) VLLM_SPARSE_D64(kind, i), VLLM_SPARSE_D16(kind, i + 64)
#define VLLM_SPARSE_D96(kind, i) VLLM_SPARSE_D64(kind, i), VLLM_SPARSE_D32(kind, i + 64)
#define VLLM_SPARSE_D128(kind, i) VLLM_SPARSE_D64(kind, i), VLLM_SPARSE_D64(kind, i + 64)

// `metadata`: this thread's word of positions; `SELECTOR`: which pair of each four threads holds them, 0 or 1 for k =
// 32 and 0 for k = 64. COUNT is N / 2, A to S the numbers of the operands behind the sums.
#define VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, COUNT, N, A, B, E, S)                     \
    template <int SELECTOR>                                                                            \
    __device__ __forceinline__ void multiply(Element, Element::Sum(&d)[COUNT], uint64_t a, uint64_t b, \
                                             uint32_t metadata) {                                      \
        asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" #N k types " {" VLLM_SPARSE_R##COUNT       \
                     "}, %" #A ", %" #B ", %" #E ", %" #S ", 1" flags ";"                              \
                     : VLLM_SPARSE_D##COUNT(kind, 0)                                                   \
                     : "l"(a), "l"(b), "r"(metadata), "n"(SELECTOR));                                  \
    }
#define VLLM_SPARSE_MULTIPLIES(Element, kind, k, types, flags)                    \
    VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, 4, 8, 4, 5, 6, 7)        \
    VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, 8, 16, 8, 9, 10, 11)     \
    VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, 16, 32, 16, 17, 18, 19)  \
    VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, 32, 64, 32, 33, 34, 35)  \
    VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, 48, 96, 48, 49, 50, 51)  \
    VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, 64, 128, 64, 65, 66, 67) \
    VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, 72, 144, 72, 73, 74, 75) \
    VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, 80, 160, 80, 81, 82, 83) \
    VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, 96, 192, 96, 97, 98, 99) \
    VLLM_SPARSE_MULTIPLY(Element, kind, k, types, flags, 128, 256, 128, 129, 130, 131)

VLLM_SPARSE_MULTIPLIES(E4m3, "+f", "k64", ".f32.e4m3.e4m3", ", 1, 1")
VLLM_SPARSE_MULTIPLIES(Int8, "+r", "k64", ".s32.s8.s8", "")
VLLM_SPARSE_MULTIPLIES(BFloat16, "+f", "k32", ".f32.bf16.bf16", ", 1, 1, 0, 0")
VLLM_SPARSE_MULTIPLIES(Float16, "+f", "k32", ".f32.f16.f16", ", 1, 1, 0, 0")

#undef VLLM_SPARSE_MULTIPLIES
#undef VLLM_SPARSE_MULTIPLY
#undef VLLM_SPARSE_D4
#undef VLLM_SPARSE_D8
#undef VLLM_SPARSE_D16
#undef VLLM_SPARSE_D32
#undef VLLM_SPARSE_D48
#undef VLLM_SPARSE_D64
#undef VLLM_SPARSE_D72
#undef VLLM_SPARSE_D80
#undef VLLM_SPARSE_D96
#undef VLLM_SPARSE_D128
#undef VLLM_SPARSE_R4
#undef VLLM_SPARSE_R8
#undef VLLM_SPARSE_R16
#undef VLLM_SPARSE_R32
#undef VLLM_SPARSE_R48
#undef VLLM_SPARSE_R64
#undef VLLM_SPARSE_R72
#undef VLLM_SPARSE_R80
#undef VLLM_SPARSE_R96
#undef VLLM_SPARSE_R128

}  // namespace vllm_sparse::wgmma
