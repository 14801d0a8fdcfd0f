// Per-row work around the multiplication: convert, quantize and lay out activations; scale and store results.
// Plain loops over short arrays, which the compiler vectorizes for the instruction set of the including file.
#pragma once

#include <cstring>

#include "panel.h"

namespace vllm_sparse::cpu {
namespace {

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float from_bf16(std::uint16_t b) { return bits_as<float>(static_cast<std::uint32_t>(b) << 16); }

// Integer arithmetic only, so that flush-to-zero modes cannot lose subnormal halves.
inline float from_fp16(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16;
    const std::uint32_t magnitude = h & 0x7fff;
    const std::uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
    const std::uint32_t tiny =
        bits_as<std::uint32_t>(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
    return bits_as<float>(sign | (magnitude < 0x400 ? tiny : normal));
}

inline std::uint16_t to_bf16(float f) {
    const std::uint32_t u = bits_as<std::uint32_t>(f);
    const std::uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const std::uint32_t nan = (u >> 16) | 0x40;
    return static_cast<std::uint16_t>((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

// Round half to even; 0.5 * 2^k added and taken away again rounds to the subnormal grid.
inline std::uint16_t to_fp16(float f) {
    const std::uint32_t u = bits_as<std::uint32_t>(f);
    const std::uint32_t sign = (u >> 16) & 0x8000;
    const std::uint32_t magnitude = u & 0x7fffffff;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const std::uint32_t tiny = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t special = magnitude > 0x7f800000 ? 0x7e00u : 0x7c00u;
    const std::uint32_t finite = magnitude < 0x38800000 ? tiny : normal;
    return static_cast<std::uint16_t>(sign | (magnitude >= 0x477ff000 ? special : finite));
}

template <Dtype dtype>
inline float load_as_float(const void* x, std::int64_t i) {
    if constexpr (dtype == Dtype::f32) return static_cast<const float*>(x)[i];
    if constexpr (dtype == Dtype::bf16) return from_bf16(static_cast<const std::uint16_t*>(x)[i]);
    if constexpr (dtype == Dtype::fp16) return from_fp16(static_cast<const std::uint16_t*>(x)[i]);
}

// Adding and taking away 1.5 * 2^23 * grid rounds to multiples of grid, half to even.
inline float round_between(float v, float lowest, float highest) {
    v = v > lowest ? v : lowest;  // in this order NaN becomes a number
    v = v < highest ? v : highest;
    return (v + 0x1.8p23f) - 0x1.8p23f;
}

inline float round_to_e4m3(float v) {
    v = v < -448.0f ? -448.0f : v;
    v = v > 448.0f ? 448.0f : v;
    std::uint32_t u = bits_as<std::uint32_t>(v);
    u = (u + 0x7ffff + ((u >> 20) & 1)) & 0xfff00000u;  // three mantissa bits
    const float tiny = (v + 0x1.8p14f) - 0x1.8p14f;     // multiples of 2^-9
    return (v < 0 ? -v : v) < 0x1p-6f ? tiny : bits_as<float>(u);
}

constexpr int kChunk = 256;  // columns converted at a time

template <Dtype dtype>
inline void convert(const void* x, std::int64_t column, int count, float* to) {
    for (int i = 0; i < count; ++i) to[i] = load_as_float<dtype>(x, column + i);
}

inline void convert(Dtype dtype, const void* x, std::int64_t column, int count, float* to) {
    switch (dtype) {
        case Dtype::f32:
            convert<Dtype::f32>(x, column, count, to);
            break;
        case Dtype::bf16:
            convert<Dtype::bf16>(x, column, count, to);
            break;
        case Dtype::fp16:
            convert<Dtype::fp16>(x, column, count, to);
            break;
    }
}

inline void quantize(const PackRow& p, int count, float* to) {
    if (p.quantize == Quantize::int8 || p.quantize == Quantize::int8_zero_point) {
        const int lowest_code = p.quantize == Quantize::int8 ? kLowestSymmetricCode : kLowestCode;
        const float lowest = static_cast<float>(lowest_code - p.zero),
                    highest = static_cast<float>(kHighestCode - p.zero);
        for (int i = 0; i < count; ++i) to[i] = round_between(to[i] / p.scale, lowest, highest);
    }
    if (p.quantize == Quantize::fp8)
        for (int i = 0; i < count; ++i) to[i] = round_to_e4m3(to[i] / p.scale);
}

// `width` elements of each row lie together; the last piece may be short (k % 8 == 4 with a width of 8).
template <int width, class T>
inline void scatter(const T* from, std::int64_t column, int count, const PackRow& p) {
    T* to = static_cast<T*>(p.tile) + column * p.rows + p.row * width;
    int i = 0;
    for (; i + width <= count; i += width) std::memcpy(to + i * p.rows, from + i, width * sizeof(T));
    if (i < count) std::memcpy(to + i * p.rows, from + i, (count - i) * sizeof(T));
}

void pack_row(const PackRow& p) {
    alignas(64) float values[kChunk];
    alignas(64) std::uint16_t halves[kChunk];
    alignas(64) std::uint8_t codes[kChunk];
    for (std::int64_t column = p.column; column < p.column + p.count; column += kChunk) {
        const std::int64_t left = p.column + p.count - column;
        const int count = static_cast<int>(left < kChunk ? left : kChunk);
        convert(p.dtype, p.x, column, count, values);
        quantize(p, count, values);
        switch (p.activation) {
            case Activation::f32:
                scatter<4>(values, column, count, p);
                break;
            case Activation::bf16:  // exact: the values came from bf16 or are e4m3
                for (int i = 0; i < count; ++i)
                    halves[i] = static_cast<std::uint16_t>(bits_as<std::uint32_t>(values[i]) >> 16);
                scatter<4>(halves, column, count, p);
                break;
            case Activation::int8:
                for (int i = 0; i < count; ++i)
                    codes[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(values[i]) + p.zero + p.offset);
                scatter<8>(codes, column, count, p);
                break;
        }
    }
}

template <Dtype dtype>
inline Range range(const void* x, std::int64_t k) {
    float lowest[64] = {}, highest[64] = {};
    std::int64_t i = 0;
    for (; i + 64 <= k; i += 64) {
        for (int j = 0; j < 64; ++j) {
            const float v = load_as_float<dtype>(x, i + j);
            lowest[j] = v < lowest[j] ? v : lowest[j];
            highest[j] = v > highest[j] ? v : highest[j];
        }
    }
    for (; i < k; ++i) {
        const float v = load_as_float<dtype>(x, i);
        lowest[0] = v < lowest[0] ? v : lowest[0];
        highest[0] = v > highest[0] ? v : highest[0];
    }
    for (int j = 1; j < 64; ++j) {
        lowest[0] = lowest[j] < lowest[0] ? lowest[j] : lowest[0];
        highest[0] = highest[j] > highest[0] ? highest[j] : highest[0];
    }
    return {lowest[0], highest[0]};
}

Range range_of_row(const void* x, Dtype dtype, std::int64_t k) {
    if (dtype == Dtype::f32) return range<Dtype::f32>(x, k);
    if (dtype == Dtype::bf16) return range<Dtype::bf16>(x, k);
    return range<Dtype::fp16>(x, k);
}

// A loop over a stripe's channels. Not unrolled: gcc would do that before it looks for vectors, and then find none.
template <class Step>
inline void each_channel(Step step) {
#pragma GCC unroll 1
    for (int i = 0; i < kChannels; ++i) step(i);
}

template <Dtype dtype>
inline void store(const float* y, int count, void* to) {
    if constexpr (dtype == Dtype::f32) {
        std::memcpy(to, y, count * sizeof(float));
    } else {
        alignas(64) std::uint16_t halves[kChannels];
        each_channel([&](int i) { halves[i] = dtype == Dtype::bf16 ? to_bf16(y[i]) : to_fp16(y[i]); });
        std::memcpy(to, halves, count * sizeof(std::uint16_t));
    }
}

template <Dtype dtype>
inline void finish(const Finish& f) {
    alignas(64) float scales[kChannels], bias[kChannels] = {}, offsets[kChannels] = {}, y[kChannels];
    alignas(64) std::int32_t integer_sums[kChannels] = {}, integers[kChannels];
    each_channel([&](int i) { scales[i] = f.channel_scales ? f.channel_scales[i] * f.factor : f.factor; });
    if (f.bias) convert(dtype, f.bias, 0, f.count, bias);
    if (f.integer) {
        std::memcpy(integer_sums, f.weight_sums, sizeof integer_sums);
    } else if (f.weight_sums) {
        const float* weight_sums = static_cast<const float*>(f.weight_sums);
        each_channel([&](int i) { offsets[i] = static_cast<float>(f.offset) * weight_sums[i]; });
    }
    const std::uint8_t* sums = static_cast<const std::uint8_t*>(f.sums);
    std::uint8_t* to = static_cast<std::uint8_t*>(f.y);
    for (std::int64_t r = 0; r < f.rows; ++r, sums += kLine, to += f.stride * (dtype == Dtype::f32 ? 4 : 2)) {
        if (f.integer) {
            const std::int32_t offset = f.row_zeros ? f.offset + f.row_zeros[r] : f.offset;
            std::memcpy(integers, sums, sizeof integers);
            each_channel([&](int i) { y[i] = static_cast<float>(integers[i] - offset * integer_sums[i]); });
        } else {
            std::memcpy(y, sums, sizeof y);
            each_channel([&](int i) { y[i] -= offsets[i]; });
        }
        const float row_scale = f.row_scales ? f.row_scales[r] : 1.0f;
        each_channel([&](int i) { y[i] = y[i] * row_scale * scales[i] + bias[i]; });
        if (f.count == kChannels)
            store<dtype>(y, kChannels, to);
        else
            store<dtype>(y, f.count, to);
    }
}

void finish_rows(const Finish& f) {
    switch (f.dtype) {
        case Dtype::f32:
            return finish<Dtype::f32>(f);
        case Dtype::bf16:
            return finish<Dtype::bf16>(f);
        case Dtype::fp16:
            return finish<Dtype::fp16>(f);
    }
}

}  // namespace
}  // namespace vllm_sparse::cpu
