// Activations to e4m3 codes, of a row as it is or of the product of a gated MLP's halves.
#include "quantize.h"
#include "token_rows.cuh"

namespace vllm_sparse::fp8 {
namespace {

template <typename T>
__device__ __forceinline__ uint4 silu_multiply(uint4 gate, uint4 up) {
    return make_uint4(vllm_sparse::silu_multiply<T>(gate.x, up.x), vllm_sparse::silu_multiply<T>(gate.y, up.y),
                      vllm_sparse::silu_multiply<T>(gate.z, up.z), vllm_sparse::silu_multiply<T>(gate.w, up.w));
}

// kGated: rows of x are gate and up, and silu(gate) * up is quantized.
template <typename T, bool kGated, int kPasses>
__global__ void __launch_bounds__(rows::kThreads, rows::kLeastBlocks)
    quantize_kernel(const uint4* x, uint2* codes, float* scale, int vectors, int blocks, bool few_tokens) {
    const rows::Part part(vectors, blocks);
    rows::begin(part, few_tokens);
    x += part.token() * vectors * (kGated ? 2 : 1);
    ptx::wait_for_dependencies();
    uint4 values[kPasses], up[kGated ? kPasses : 1];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        values[pass] = part.load(x, pass);
        if constexpr (kGated) up[pass] = part.load(x + vectors, pass);
    }
    if constexpr (kGated) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) values[pass] = silu_multiply<T>(values[pass], up[pass]);
    }
    rows::store_quantized<T, 0>(values, part, codes, scale);
}

struct Kernels {
    template <typename T, bool kGated, int kPasses>
    static constexpr auto kernel = quantize_kernel<T, kGated, kPasses>;
};

}  // namespace

const char* quantize(const QuantizeArguments& a, void* stream) {
    if (a.m == 0) return nullptr;
    if (const char* reason = rows::reason_against(a.m, a.k)) return reason;
    const rows::Layout layout(a.m, a.k);
    return rows::launch(rows::kernel_of<Kernels>(a.half, a.gated, layout), layout, a.device, a.overlap, stream,
                        static_cast<const uint4*>(a.x), static_cast<uint2*>(a.codes), a.scale, a.k / rows::kVector,
                        layout.blocks, layout.few_tokens);
}

}  // namespace vllm_sparse::fp8
