// Kernels over the rows of activations, one token per cluster of 1 to 8 blocks. A compiler's reduction kernel walks
// over a row with one block, twice, which takes longer at few tokens than the multiplication's loads; here every thread
// holds its values in registers. The kernel behind (a linear layer) starts at once, so that its weight is on the way
// meanwhile.
#pragma once

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "device_guard.h"
#include "hopper_ptx.cuh"
#include "launch.h"
#include "pairs.cuh"

namespace vllm_sparse::rows {

constexpr int kThreads = 512;
constexpr int kLeastBlocks = 2;            // per multiprocessor: one loads while another waits for its row's sum
constexpr int kVector = 8;                 // values per thread and load
constexpr int kPass = kThreads * kVector;  // columns per block and load
constexpr int kMostPasses = 4, kMostBlocks = 8;
constexpr int kMostColumns = kPass * kMostPasses * kMostBlocks;
constexpr float kLargest = 448.f, kLeastScale = 1.f / (448.f * 512.f);

// This block's part of a row of `vectors` x 8 values.
struct Part {
    int vectors, blocks, block;

    __device__ __forceinline__ Part(int vectors, int blocks)
        : vectors(vectors), blocks(blocks), block(blockIdx.x % blocks) {}
    __device__ __forceinline__ int64_t token() const { return blockIdx.x / blocks; }
    __device__ __forceinline__ int at(int pass) const { return (pass * blocks + block) * kThreads + threadIdx.x; }
    __device__ __forceinline__ uint4 load(const uint4* row, int pass) const {
        return at(pass) < vectors ? row[at(pass)] : make_uint4(0, 0, 0, 0);
    }
};

struct Largest {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// To be called first: with few tokens the kernel behind may start; the cluster's blocks tell each other that they run.
__device__ __forceinline__ void begin(const Part& part, bool few_tokens) {
    if (few_tokens) ptx::launch_dependents();
    if (part.blocks > 1) ptx::cluster_arrive();
}

template <typename Op>
__device__ __forceinline__ float reduce_warp(float v, Op op) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, lanes));
    return v;
}

// Of all threads' values in all blocks of the cluster, always in the same order. kUse: 0 for a kernel's first
// reduction, 1 for its second.
template <int kUse, typename Op>
__device__ __forceinline__ float reduce(float v, const Part& part, Op op) {
    __shared__ float warps[kThreads / 32], parts[kMostBlocks];
    v = reduce_warp(v, op);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = warps[threadIdx.x % (kThreads / 32)];
#pragma unroll
    for (int lanes = kThreads / 64; lanes > 0; lanes /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, lanes));
    if (part.blocks == 1) return v;
    if (kUse == 0) ptx::cluster_wait();  // all blocks have begun
    if (threadIdx.x < part.blocks) {
        asm volatile(
            "{\n.reg .b32 remote;\n"
            "mapa.shared::cluster.u32 remote, %0, %1;\n"
            "st.shared::cluster.f32 [remote], %2;\n}" ::"r"(ptx::shared_address(parts + ptx::cluster_rank())),
            "r"(threadIdx.x), "f"(v)
            : "memory");
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    v = parts[0];
    for (int block = 1; block < part.blocks; ++block) v = op(v, parts[block]);
    return v;
}

// Store e4m3 codes of the row whose values the threads hold as 16-bit pairs, and its scale.
template <typename T, int kUse, int kPasses>
__device__ __forceinline__ void store_quantized(const uint4 (&values)[kPasses], const Part& part, uint2* codes,
                                                float* scale) {
    float largest = 0.f;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const uint32_t (&pairs)[4] = reinterpret_cast<const uint32_t (&)[4]>(values[pass]);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const float2 v = unpack(pairs[p], T());
            largest = fmaxf(largest, fmaxf(fabsf(v.x), fabsf(v.y)));
        }
    }
    const float s = fmaxf(reduce<kUse>(largest, part, Largest()) / kLargest, kLeastScale), reciprocal = 1.f / s;
    if (part.block == 0 && threadIdx.x == 0) scale[part.token()] = s;
    codes += part.token() * part.vectors;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const uint32_t (&pairs)[4] = reinterpret_cast<const uint32_t (&)[4]>(values[pass]);
        uint32_t words[2];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const float2 v = unpack(pairs[p], T());
            const uint32_t two =
                __nv_cvt_float2_to_fp8x2(make_float2(v.x * reciprocal, v.y * reciprocal), __NV_SATFINITE, __NV_E4M3);
            words[p / 2] = p % 2 == 0 ? two : words[p / 2] | two << 16;
        }
        if (part.at(pass) < part.vectors) codes[part.at(pass)] = make_uint2(words[0], words[1]);
    }
}

// ---- host -----------------------------------------------------------------------------------------------------------

constexpr int kFewTokens = 64;

// nullptr, or why rows of k values of m tokens cannot be done.
inline const char* reason_against(int m, int k) {
    static_assert(kMostColumns == 131072);
    if (m >= 0 && k > 0 && k % kVector == 0 && k <= kMostColumns) return nullptr;
    return "k must be a multiple of 8 up to 131072";
}

// How rows of k values are laid out: few tokens are spread over the chip; many fill it anyway, and a cluster's barrier
// is the dearer part then.
struct Layout {
    int tokens, blocks, passes;
    bool few_tokens;

    Layout(int m, int k) : tokens(m), few_tokens(m <= kFewTokens) {
        const int one = ceil_div(k, kPass);
        blocks = few_tokens ? (one < kMostBlocks ? one : kMostBlocks) : ceil_div(one, kMostPasses);
        passes = ceil_div(one, blocks);
        passes = passes > 2 ? kMostPasses : passes;
    }
    static int ceil_div(int a, int b) { return (a + b - 1) / b; }
};

// Family::kernel<T, kFlag, kPasses> for the type, one flag and the layout.
template <typename Family, typename T, bool kFlag>
auto kernel_of(const Layout& layout) {
    switch (layout.passes) {
        case 1:
            return Family::template kernel<T, kFlag, 1>;
        case 2:
            return Family::template kernel<T, kFlag, 2>;
        default:
            return Family::template kernel<T, kFlag, kMostPasses>;
    }
}

template <typename Family>
auto kernel_of(bool half, bool flag, const Layout& layout) {
    if (half) return flag ? kernel_of<Family, __half, true>(layout) : kernel_of<Family, __half, false>(layout);
    return flag ? kernel_of<Family, __nv_bfloat16, true>(layout) : kernel_of<Family, __nv_bfloat16, false>(layout);
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), const Layout& layout, int device, bool overlap, void* stream,
                   Arguments... arguments) {
    const DeviceGuard guard(device);
    if (guard.error != nullptr) return guard.error;
    const LaunchConfig config({reinterpret_cast<const void*>(kernel), layout.tokens * layout.blocks, kThreads, 0,
                               layout.blocks > 1 ? layout.blocks : 0, overlap, static_cast<cudaStream_t>(stream)});
    return text(cudaLaunchKernelEx(config.get(), kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace vllm_sparse::rows
