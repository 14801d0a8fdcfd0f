// The multiplication, once for all vector types. Weights stay compressed: the positions of a group pick, from a
// broadcast of the group's four (or two groups' eight) activations, the ones that its kept values multiply. Half the
// multiplications of a dense product, and no zero is ever written.
//
// A vector type V has `lanes` channels and the operations used below; 16 / lanes of them make a stripe.
#pragma once

#include "panel.h"

namespace vllm_sparse::cpu {
namespace {

#define VLLM_SPARSE_INLINE inline __attribute__((always_inline))

template <int i>
struct Index {
    static constexpr int value = i;
};

// Calls step(Index<0>), ..., step(Index<n - 1>): shifts by the index are immediates.
template <int n, int i = 0, class Step>
VLLM_SPARSE_INLINE void each(Step&& step) {
    if constexpr (i < n) {
        step(Index<i>{});
        each<n, i + 1>(step);
    }
}

// log2 of a tile's rows to rows.
constexpr int tile_rows(int tile) { return 1 << tile; }

// Bytes that weights are fetched ahead of their use. Above one row the arithmetic of a panel outlasts what the hardware
// prefetcher dares: 10 to 30 % at 2 to 16 rows on Zen 4, where 2 to 8 KB are alike.
constexpr int kAhead = 3072;

template <Format format>
VLLM_SPARSE_INLINE void fetch_ahead(const std::uint8_t* panel) {
    for (int i = 0; i < panel_bytes(format); i += kLine) __builtin_prefetch(panel + kAhead + i);
}

// The two kept values of group g as floats. fp8 comes out times 2^-8: widened to fp16, whose exponent bias is 8
// larger, and the conversion from fp16 keeps subnormals in every floating-point mode.
template <class V, Format format, int g>
VLLM_SPARSE_INLINE void decode(const std::uint8_t* values, typename V::Float& v0, typename V::Float& v1) {
    constexpr int bits = value_bits(format), per_line = 16 / bits, shift = bits * (g % per_line);
    const typename V::Int x = V::load(values + kLine * (g / per_line));
    if constexpr (format == Format::bf16) {
        v0 = V::as_float(V::template shl<16>(x));
        v1 = V::as_float(V::and_(x, 0xffff0000u));
    } else if constexpr (format == Format::fp16) {
        v0 = V::half_to_float(x);
        v1 = V::half_to_float(V::template shr<16>(x));
    } else if constexpr (format == Format::fp8) {
        const typename V::Int e0 = V::template sar<1>(V::template shl<24 - shift>(x));
        const typename V::Int e1 = V::template sar<1>(V::template shl<8 - shift>(x));
        v0 = V::half_to_float(V::template shr<16>(V::and_(e0, 0xbf800000u)));
        v1 = V::half_to_float(V::template shr<16>(V::and_(e1, 0xbf800000u)));
    } else {
        v0 = V::to_float(V::template sar<32 - bits>(V::template shl<32 - bits - shift>(x)));
        v1 = V::to_float(V::template sar<32 - bits>(V::template shl<16 - bits - shift>(x)));
    }
}

template <class V>
VLLM_SPARSE_INLINE typename V::Float load_scales(const Block& b, std::int64_t first) {
    if (b.scale_dtype == Dtype::f32) return V::load_float(static_cast<const float*>(b.scales) + first);
    const typename V::Int words = V::load_words(static_cast<const std::uint16_t*>(b.scales) + first);
    return b.scale_dtype == Dtype::fp16 ? V::half_to_float(words) : V::as_float(V::template shl<16>(words));
}

// Float activations [k / 4][rows][4]; `panels` panels of V::lanes channels.
template <class V, Format format, int rows>
VLLM_SPARSE_INLINE void accumulate(const std::uint8_t* weight, const float* x, std::int64_t panels,
                                   typename V::Float (&sums)[rows]) {
    typename V::Float odd[rows];  // kept values 1: a second chain of additions
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sums[r] = odd[r] = V::zero();
    for (std::int64_t p = 0; p < panels; ++p, weight += panel_bytes(format), x += kColumns * rows) {
        fetch_ahead<format>(weight);
        const typename V::Int positions = V::load(weight);
        each<kGroups>([&](auto index) __attribute__((always_inline)) {
            constexpr int g = decltype(index)::value;
            typename V::Float v0, v1;
            decode<V, format, g>(weight + kLine, v0, v1);
            const typename V::Int i0 = V::template shr<2 * g>(positions), i1 = V::template shr<16 + 2 * g>(positions);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
                const typename V::Four four = V::load_four(x + (g * rows + r) * 4);
                sums[r] = V::fma(V::pick(four, i0), v0, sums[r]);
                if constexpr (rows <= 4) odd[r] = V::fma(V::pick(four, i1), v1, odd[r]);
                if constexpr (rows > 4) sums[r] = V::fma(V::pick(four, i1), v1, sums[r]);
            }
        });
    }
    if constexpr (rows <= 4)
        for (int r = 0; r < rows; ++r) sums[r] = V::add(sums[r], odd[r]);
}

// A vector narrower than a stripe goes over a run of panels several times; the run then stays in the L1 cache.
constexpr std::int64_t kRun = 16;

template <class V, Format format, int rows>
void multiply_float(const Block& b) {
    const std::int64_t whole = V::lanes == kChannels ? b.panels : kRun;
    const std::int64_t run = b.scales ? b.group_panels : whole;
    for (std::int64_t p = 0, group = 0; p < b.panels; p += run, ++group) {
        const std::int64_t count = b.panels - p < run ? b.panels - p : run;
        const float* x = static_cast<const float*>(b.activations) + p * kColumns * rows;
        for (int c = 0; c < kChannels; c += V::lanes) {
            typename V::Float sums[rows];
            accumulate<V, format, rows>(b.weight + p * panel_bytes(format) + 4 * c, x, count, sums);
            const typename V::Float scale = b.scales ? load_scales<V>(b, group * kChannels + c) : V::one();
            float* total = static_cast<float*>(b.sums) + c;
            for (int r = 0; r < rows; ++r, total += kChannels)
                V::store_float(total, V::fma(sums[r], scale, V::load_float(total)));
        }
    }
}

// The four kept values of pair j, one per byte. 4-bit ones come out times 16: their sign needs no extension that way.
template <class V, Format format, int j>
VLLM_SPARSE_INLINE typename V::Int decode_pair(const std::uint8_t* values) {
    if constexpr (format == Format::int8) return V::load(values + kLine * j);
    const typename V::Int halves = V::load(values + kLine * (j / 2));
    return V::and_(j % 2 ? halves : V::template shl<4>(halves), 0xf0f0f0f0u);
}

// int8 activations [k / 8][rows][8], exact int32 sums.
template <class V, Format format, int rows>
VLLM_SPARSE_INLINE void accumulate_pairs(const std::uint8_t* weight, const std::uint8_t* x, std::int64_t panels,
                                         typename V::Int (&sums)[rows]) {
    constexpr int chains = rows == 1 ? 4 : rows <= 4 ? 2 : 1;
    typename V::Int partial[chains][rows];
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i)
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) partial[i][r] = V::zero_int();
    for (std::int64_t p = 0; p < panels; ++p, weight += panel_bytes(format), x += kColumns * rows) {
        fetch_ahead<format>(weight);
        const typename V::Int positions = V::load(weight);
        each<kGroups / 2>([&](auto index) __attribute__((always_inline)) {
            constexpr int j = decltype(index)::value;
            const typename V::Int picks = V::pair_positions(V::template shr<2 * j>(positions));
            const typename V::Int values = decode_pair<V, format, j>(weight + kLine);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r)
                partial[j % chains][r] = V::dot(partial[j % chains][r], x + (j * rows + r) * 8, picks, values);
        });
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
        sums[r] = partial[0][r];
#pragma GCC unroll 4
        for (int i = 1; i < chains; ++i) sums[r] = V::add_int(sums[r], partial[i][r]);
    }
}

template <class V, Format format, int rows>
void multiply_pairs(const Block& b) {
    const std::int64_t whole = V::lanes == kChannels ? b.panels : kRun;
    const std::int64_t run = b.scales ? b.group_panels : whole;
    for (std::int64_t p = 0, group = 0; p < b.panels; p += run, ++group) {
        const std::int64_t count = b.panels - p < run ? b.panels - p : run;
        const std::uint8_t* x = static_cast<const std::uint8_t*>(b.activations) + p * kColumns * rows;
        for (int c = 0; c < kChannels; c += V::lanes) {
            typename V::Int sums[rows];
            accumulate_pairs<V, format, rows>(b.weight + p * panel_bytes(format) + 4 * c, x, count, sums);
            if constexpr (format == Format::int8) {
                std::int32_t* total = static_cast<std::int32_t*>(b.sums) + c;
                for (int r = 0; r < rows; ++r, total += kChannels) V::store(total, V::add_int(V::load(total), sums[r]));
            } else {
                const typename V::Float scale = b.scales ? load_scales<V>(b, group * kChannels + c) : V::one();
                float* total = static_cast<float*>(b.sums) + c;
                for (int r = 0; r < rows; ++r, total += kChannels)
                    V::store_float(total, V::fma(V::to_float(sums[r]), scale, V::load_float(total)));
            }
        }
    }
}

}  // namespace
}  // namespace vllm_sparse::cpu

// A row of Tier::multiply: 1, 2, 4, 8 and, where the registers suffice, 16 rows.
#define VLLM_SPARSE_TILES_8(function, ...) \
    {function<__VA_ARGS__, 1>, function<__VA_ARGS__, 2>, function<__VA_ARGS__, 4>, function<__VA_ARGS__, 8>, nullptr}
#define VLLM_SPARSE_TILES_16(function, ...)                                                                  \
    {function<__VA_ARGS__, 1>, function<__VA_ARGS__, 2>, function<__VA_ARGS__, 4>, function<__VA_ARGS__, 8>, \
     function<__VA_ARGS__, 16>}
