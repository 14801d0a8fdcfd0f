// The CPU kernels without Python: pack a 2:4 weight once, multiply by it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "panel.h"

namespace vllm_sparse::cpu {

// The tiers that this machine runs, best first.
std::vector<const Tier*> available_tiers();

// The tier named, or the best one for an empty name. Throws std::invalid_argument, naming those that exist here.
const Tier& find_tier(const std::string& name);

struct Weight {
    Format format;
    std::int64_t n, k;
    std::int64_t group_size;     // columns per group scale, a multiple of 32; 0: channel scales
    const std::uint8_t* panels;  // packed_bytes(format, n, k)
    const void* group_scales;    // [stripes][k / group_size][16], or null
    Dtype group_scale_dtype;
    const float* channel_scales;  // [stripes * 16], or null
    const void* sums;  // [stripes * 16], int32 for Format::int8: of each channel's values; see linear for w4a8
};

// What is multiplied: x [m, k] with rows `stride` elements apart.
struct Input {
    const void* x;
    Dtype dtype;
    std::int64_t m, stride;
    Quantize quantize;         // none, or the weight format's own: int8 with zero points or without, fp8
    const float* scale;        // [1], of the whole of x; null: each row has its own, from its elements
    const std::int32_t* zero;  // [1], the zero point that goes with it
};

struct Output {
    void* y;  // [m, n], contiguous
    Dtype dtype;
    const void* bias;  // [n] of dtype, or null
};

std::int64_t stripes(std::int64_t n);
std::int64_t packed_bytes(Format format, std::int64_t n, std::int64_t k);

// values [n, k / 2] (2 bytes each for bf16 and fp16, else 1; w4a16: one code per byte) and positions [n, ceil(k / 8)],
// as Sparse24Weight has them, into `panels`; sums [stripes * 16] are written for Format::int8 only.
void pack(Format format, std::int64_t n, std::int64_t k, const void* values, const std::uint8_t* positions,
          std::uint8_t* panels, std::int32_t* sums);

// y = x * weight^T + bias, in one parallel region of the caller's OpenMP. Format::w4a8 multiplies 16 times the 4-bit
// values; its sums, float, are those of 16 * value * group scale (without group scales, of 16 * value).
void linear(const Tier& tier, const Weight& weight, const Input& input, const Output& output);

}  // namespace vllm_sparse::cpu
