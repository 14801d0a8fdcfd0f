// Residual sum and norm of a row, to 16 bits or to e4m3 codes.
#include "norm.h"
#include "token_rows.cuh"

namespace vllm_sparse::norm {
namespace {

struct Pointers {
    const uint4 *x, *residual, *weight;
    uint4 *residual_out, *out;
    uint2* codes;
    float* scale;
};

// The sum of two rows' pieces, unrounded.
template <typename T>
__device__ __forceinline__ void add(float2 (&sum)[4], uint4 x, uint4 residual) {
    const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {residual.x, residual.y, residual.z, residual.w};
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const float2 u = unpack(a[p], T()), v = unpack(b[p], T());
        sum[p] = make_float2(u.x + v.x, u.y + v.y);
    }
}

template <typename T>
__device__ __forceinline__ uint4 round(const float2 (&v)[4]) {
    return make_uint4(pack(v[0].x, v[0].y, T()), pack(v[1].x, v[1].y, T()), pack(v[2].x, v[2].y, T()),
                      pack(v[3].x, v[3].y, T()));
}

// v * factor, rounded, times weight, rounded.
template <typename T>
__device__ __forceinline__ uint4 scale(const float2 (&v)[4], float factor, uint4 weight) {
    const uint32_t w[4] = {weight.x, weight.y, weight.z, weight.w};
    float2 product[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const float2 normed = unpack(pack(v[p].x * factor, v[p].y * factor, T()), T()), by = unpack(w[p], T());
        product[p] = make_float2(normed.x * by.x, normed.y * by.y);
    }
    return round<T>(product);
}

template <typename T, bool kQuantized, int kPasses>
__global__ void __launch_bounds__(rows::kThreads, kPasses <= 2 ? rows::kLeastBlocks : 1)
    add_norm_kernel(const __grid_constant__ Pointers to, float epsilon, int vectors, int blocks, bool few_tokens) {
    const rows::Part part(vectors, blocks);
    rows::begin(part, few_tokens);
    const int64_t row = part.token() * vectors;
    ptx::wait_for_dependencies();  // for the norm's weight as well, which a kernel of the graph may have made
    uint4 weight[kPasses], values[kPasses];
    float2 sums[kPasses][4];
    float squares = 0.f;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        weight[pass] = part.load(to.weight, pass);
        add<T>(sums[pass], part.load(to.x + row, pass), part.load(to.residual + row, pass));
#pragma unroll
        for (int p = 0; p < 4; ++p) squares += sums[pass][p].x * sums[pass][p].x + sums[pass][p].y * sums[pass][p].y;
    }
    const float mean = rows::reduce<0>(squares, part, rows::Sum()) / static_cast<float>(8 * vectors);
    const float factor = rsqrtf(mean + epsilon);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        values[pass] = scale<T>(sums[pass], factor, weight[pass]);
        if (part.at(pass) >= vectors) continue;
        to.residual_out[row + part.at(pass)] = round<T>(sums[pass]);
        if constexpr (!kQuantized) to.out[row + part.at(pass)] = values[pass];
    }
    if constexpr (kQuantized) rows::store_quantized<T, 1>(values, part, to.codes, to.scale);
}

struct Kernels {
    template <typename T, bool kQuantized, int kPasses>
    static constexpr auto kernel = add_norm_kernel<T, kQuantized, kPasses>;
};

}  // namespace

const char* add_norm(const AddNormArguments& a, void* stream) {
    if (a.m == 0) return nullptr;
    if (const char* reason = rows::reason_against(a.m, a.k)) return reason;
    const rows::Layout layout(a.m, a.k);
    const Pointers to{static_cast<const uint4*>(a.x),
                      static_cast<const uint4*>(a.residual),
                      static_cast<const uint4*>(a.weight),
                      static_cast<uint4*>(a.residual_out),
                      static_cast<uint4*>(a.out),
                      static_cast<uint2*>(a.codes),
                      a.scale};
    return rows::launch(rows::kernel_of<Kernels>(a.half, a.codes != nullptr, layout), layout, a.device, a.overlap,
                        stream, to, a.epsilon, a.k / rows::kVector, layout.blocks, layout.few_tokens);
}

}  // namespace vllm_sparse::norm
