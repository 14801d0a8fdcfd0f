// One token per cluster of 1 to 8 blocks. A compiler's reduction kernel walks over a row with one block, twice, which
// takes longer at few tokens than the multiplication's loads; here every thread holds its values in registers. The
// kernel behind (the linear layer) starts at once, so that its weight is on the way meanwhile.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "device_guard.h"
#include "hopper_ptx.cuh"
#include "quantize.h"

namespace vllm_sparse::fp8 {
namespace {

constexpr int kThreads = 512;
constexpr int kLeastBlocks = 2;            // per multiprocessor: one loads while another waits for its largest value
constexpr int kVector = 8;                 // values per thread and load
constexpr int kPass = kThreads * kVector;  // columns per block and load
constexpr int kMostPasses = 4, kMostBlocks = 8;
constexpr float kLargest = 448.f, kLeastScale = 1.f / (448.f * 512.f);
static_assert(kMostColumns == kPass * kMostPasses * kMostBlocks);

template <bool kHalf>
__device__ __forceinline__ uint32_t pack(float a, float b) {
    if constexpr (kHalf) {
        const __half2 pair = __floats2half2_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
}

template <bool kHalf>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
    if constexpr (kHalf) return __half22float2(*reinterpret_cast<const __half2*>(&pair));
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

__device__ __forceinline__ float largest_of_warp(float v) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lanes));
    return v;
}

// A quotient that is a few units off in the last place: what it is rounded to has sixteen bits less.
__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.f + __expf(-v)); }

// silu(gate) * up of two values, each step rounded to 16 bits as the layers of a model round it.
template <bool kHalf>
__device__ __forceinline__ uint32_t silu_multiply(uint32_t gate, uint32_t up) {
    const float2 g = unpack<kHalf>(gate), u = unpack<kHalf>(up);
    const float2 s = unpack<kHalf>(pack<kHalf>(silu(g.x), silu(g.y)));
    return pack<kHalf>(s.x * u.x, s.y * u.y);
}

template <bool kHalf>
__device__ __forceinline__ uint4 silu_multiply(uint4 gate, uint4 up) {
    return make_uint4(silu_multiply<kHalf>(gate.x, up.x), silu_multiply<kHalf>(gate.y, up.y),
                      silu_multiply<kHalf>(gate.z, up.z), silu_multiply<kHalf>(gate.w, up.w));
}

// The largest of all threads' values in all blocks of the cluster.
__device__ __forceinline__ float largest_of_cluster(float v, int blocks) {
    __shared__ float warps[kThreads / 32], parts[kMostBlocks];
    v = largest_of_warp(v);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    v = largest_of_warp(warps[threadIdx.x % (kThreads / 32)]);
    if (blocks == 1) return v;
    ptx::cluster_wait();  // all blocks have begun
    if (threadIdx.x < blocks) {
        asm volatile(
            "{\n.reg .b32 remote;\n"
            "mapa.shared::cluster.u32 remote, %0, %1;\n"
            "st.shared::cluster.f32 [remote], %2;\n}" ::"r"(ptx::shared_address(parts + ptx::cluster_rank())),
            "r"(threadIdx.x), "f"(v)
            : "memory");
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    v = parts[0];
    for (int block = 1; block < blocks; ++block) v = fmaxf(v, parts[block]);
    return v;
}

// kGated: rows of x are gate and up, and silu(gate) * up is quantized.
template <bool kHalf, bool kGated, int kPasses>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    quantize_kernel(const uint4* x, uint2* codes, float* scale, int vectors, int blocks, bool few_tokens) {
    if (few_tokens) ptx::launch_dependents();
    if (blocks > 1) ptx::cluster_arrive();
    const int64_t token = blockIdx.x / blocks;
    const int block = blockIdx.x % blocks;
    x += token * vectors * (kGated ? 2 : 1), codes += token * vectors;
    ptx::wait_for_dependencies();
    uint4 values[kPasses], up[kGated ? kPasses : 1];
    float largest = 0.f;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int i = (pass * blocks + block) * kThreads + threadIdx.x;
        values[pass] = i < vectors ? x[i] : make_uint4(0, 0, 0, 0);
        if constexpr (kGated) up[pass] = i < vectors ? x[vectors + i] : make_uint4(0, 0, 0, 0);
    }
    if constexpr (kGated) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) values[pass] = silu_multiply<kHalf>(values[pass], up[pass]);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const uint32_t (&pairs)[4] = reinterpret_cast<const uint32_t (&)[4]>(values[pass]);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const float2 v = unpack<kHalf>(pairs[p]);
            largest = fmaxf(largest, fmaxf(fabsf(v.x), fabsf(v.y)));
        }
    }
    const float s = fmaxf(largest_of_cluster(largest, blocks) / kLargest, kLeastScale), reciprocal = 1.f / s;
    if (block == 0 && threadIdx.x == 0) scale[token] = s;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int i = (pass * blocks + block) * kThreads + threadIdx.x;
        const uint32_t (&pairs)[4] = reinterpret_cast<const uint32_t (&)[4]>(values[pass]);
        uint32_t words[2];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const float2 v = unpack<kHalf>(pairs[p]);
            const uint32_t two =
                __nv_cvt_float2_to_fp8x2(make_float2(v.x * reciprocal, v.y * reciprocal), __NV_SATFINITE, __NV_E4M3);
            words[p / 2] = p % 2 == 0 ? two : words[p / 2] | two << 16;
        }
        if (i < vectors) codes[i] = make_uint2(words[0], words[1]);
    }
}

using Kernel = void (*)(const uint4*, uint2*, float*, int, int, bool);

template <bool kHalf, bool kGated>
Kernel kernel_of(int passes) {
    switch (passes) {
        case 1:
            return quantize_kernel<kHalf, kGated, 1>;
        case 2:
            return quantize_kernel<kHalf, kGated, 2>;
        default:
            return quantize_kernel<kHalf, kGated, kMostPasses>;
    }
}

Kernel kernel_of(bool half, bool gated, int passes) {
    if (half) return gated ? kernel_of<true, true>(passes) : kernel_of<true, false>(passes);
    return gated ? kernel_of<false, true>(passes) : kernel_of<false, false>(passes);
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace

const char* quantize(const QuantizeArguments& a, void* stream) {
    if (a.m == 0) return nullptr;
    if (a.m < 0 || a.k <= 0 || a.k % kVector != 0 || a.k > kMostColumns)
        return "k must be a multiple of 8 up to 131072";
    // Few tokens are spread over the chip; many fill it anyway, and a cluster's barrier is the dearer part then.
    constexpr int kFewTokens = 64;
    const bool few_tokens = a.m <= kFewTokens;
    const int passes_of_one = ceil_div(a.k, kPass);
    const int blocks =
        few_tokens ? (passes_of_one < kMostBlocks ? passes_of_one : kMostBlocks) : ceil_div(passes_of_one, kMostPasses);
    const int passes = ceil_div(passes_of_one, blocks);
    const DeviceGuard guard(a.device);
    if (guard.error != nullptr) return guard.error;
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(a.m * blocks);
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (a.overlap) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (blocks > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    }
    const cudaError_t error =
        cudaLaunchKernelEx(&config, kernel_of(a.half, a.gated, passes), static_cast<const uint4*>(a.x),
                           static_cast<uint2*>(a.codes), a.scale, a.k / kVector, blocks, few_tokens);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vllm_sparse::fp8
