// AVX-512 with BF16 (Zen 4, Cooper Lake, Sapphire Rapids): bf16 activations are multiplied as they are, two kept
// values of a group at once. A product of two bf16 numbers is exact in float, so nothing but the order of the additions
// differs from the float kernels. vdpbf16ps takes subnormals as zero: bf16 ones, below 1.2e-38, are lost.
#include "avx512_vector.h"
#include "select.h"

namespace vllm_sparse::cpu {
namespace {

// bf16 of -8..7 by nibble, twice, so that vpermw's five index bits may hold a stray fifth.
alignas(64) constexpr std::uint16_t kNibbles[32] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};

// bf16 of the e4m3 magnitudes 0..7 * 2^-9 (zero and the subnormals), times 2^-8 as the float kernels have them.
alignas(64) constexpr std::uint16_t kTiny[32] = {0x0000, 0x3700, 0x3780, 0x37c0, 0x3800, 0x3820, 0x3840, 0x3860};

// The kept values of group g, two bf16 per channel.
template <Format format, int g>
VLLM_SPARSE_INLINE __m512i decode_bf16(const std::uint8_t* values) {
    constexpr int bits = value_bits(format), per_line = 16 / bits, shift = bits * (g % per_line);
    const __m512i x = _mm512_loadu_si512(values + kLine * (g / per_line));
    if constexpr (format == Format::bf16) {
        return x;
    } else if constexpr (format == Format::w4a16) {
        return _mm512_permutexvar_epi16(_mm512_srli_epi16(x, shift), _mm512_load_si512(kNibbles));
    } else if constexpr (format == Format::fp8) {
        const __m512i magnitude = _mm512_and_si512(_mm512_srli_epi16(x, shift), _mm512_set1_epi16(0x7f));
        const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(x, 8 - shift), _mm512_set1_epi16(-0x8000));
        const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(0x3800));
        const __mmask32 tiny = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
        return _mm512_or_si512(sign, _mm512_mask_permutexvar_epi16(normal, tiny, magnitude, _mm512_load_si512(kTiny)));
    } else {  // int8 through float, whose upper half is then the bf16; both halves come out exact
        const __m512 v0 = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 24 - shift), 24));
        const __m512 v1 = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(x, 8 - shift), 24));
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(v0), 16), _mm512_castps_si512(v1));
    }
}

template <Format format, int rows>
VLLM_SPARSE_INLINE void accumulate_bf16(const std::uint8_t* weight, const std::uint16_t* x, std::int64_t panels,
                                        __m512 (&sums)[rows]) {
    constexpr int chains = rows == 1 ? 4 : rows <= 4 ? 2 : 1;
    __m512 partial[chains][rows];
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i)
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) partial[i][r] = _mm512_setzero_ps();
    for (std::int64_t p = 0; p < panels; ++p, weight += panel_bytes(format), x += kColumns * rows) {
        fetch_ahead<format>(weight);
        const __m512i positions = _mm512_loadu_si512(weight);
        each<kGroups>([&](auto index) __attribute__((always_inline)) {
            constexpr int g = decltype(index)::value;
            const __m512i values = decode_bf16<format, g>(weight + kLine);
            // The four columns repeat every four words: index bits above the lowest two do not matter.
            const __m512i picks = _mm512_srli_epi16(positions, 2 * g);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
                long long columns;
                __builtin_memcpy(&columns, x + (g * rows + r) * 4, sizeof columns);
                const __m512i selected = _mm512_permutexvar_epi16(picks, _mm512_set1_epi64(columns));
                partial[g % chains][r] = _mm512_dpbf16_ps(partial[g % chains][r], (__m512bh)selected, (__m512bh)values);
            }
        });
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
        sums[r] = partial[0][r];
#pragma GCC unroll 4
        for (int i = 1; i < chains; ++i) sums[r] = _mm512_add_ps(sums[r], partial[i][r]);
    }
}

template <Format format, int rows>
void multiply_bf16(const Block& b) {
    const std::int64_t run = b.scales ? b.group_panels : b.panels;
    for (std::int64_t p = 0, group = 0; p < b.panels; p += run, ++group) {
        const std::uint16_t* x = static_cast<const std::uint16_t*>(b.activations) + p * kColumns * rows;
        __m512 sums[rows];
        accumulate_bf16<format, rows>(b.weight + p * panel_bytes(format), x, run, sums);
        const __m512 scale = b.scales ? load_scales<Avx512>(b, group * kChannels) : Avx512::one();
        float* total = static_cast<float*>(b.sums);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r, total += kChannels)
            _mm512_storeu_ps(total, _mm512_fmadd_ps(sums[r], scale, _mm512_loadu_ps(total)));
    }
}

}  // namespace

const Multiply avx512_bf16_multiply[kFormats][kTiles] = {VLLM_SPARSE_TILES_16(multiply_bf16, Format::bf16),
                                                         {},
                                                         VLLM_SPARSE_TILES_16(multiply_bf16, Format::fp8),
                                                         VLLM_SPARSE_TILES_16(multiply_bf16, Format::w8a16),
                                                         VLLM_SPARSE_TILES_16(multiply_bf16, Format::w4a16),
                                                         {},
                                                         {}};

}  // namespace vllm_sparse::cpu
