// Two 16-bit floats of one word, and what a gated MLP does with them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vllm_sparse {

__device__ __forceinline__ float2 unpack(uint32_t word, __nv_bfloat16) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack(uint32_t word, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// A quotient that is a few units off in the last place: what it is rounded to has sixteen bits less.
__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.f + __expf(-v)); }

// silu(gate) * up of two values, each step rounded to 16 bits as the layers of a model round it.
template <typename T>
__device__ __forceinline__ uint32_t silu_multiply(uint32_t gate, uint32_t up) {
    const float2 g = unpack(gate, T()), u = unpack(up, T());
    const float2 s = unpack(pack(silu(g.x), silu(g.y), T()), T());
    return pack(s.x * u.x, s.y * u.y, T());
}

}  // namespace vllm_sparse
