// x^T x of bf16 activations: lines of 16 columns by two tokens, whose products vdpbf16ps adds up in float.
#include <immintrin.h>

#include "panel.h"

namespace vllm_sparse::cpu {
namespace {

constexpr int kTileRows = 8, kTilePanels = 3;  // 24 sums, three columns' lines and a broadcast fit into 32 registers

__mmask16 lanes(std::int64_t columns) { return columns >= 16 ? 0xffff : static_cast<__mmask16>((1u << columns) - 1); }

void pack(const std::uint16_t* x, std::int64_t tokens, std::int64_t stride, std::int64_t columns,
          std::uint32_t* panel) {
    const __mmask16 mask = lanes(columns);
    for (std::int64_t t = 0; t < tokens; t += 2, x += 2 * stride, panel += kGramColumns) {
        const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
        const __mmask16 second_mask = t + 1 < tokens ? mask : 0;
        const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second_mask, x + stride));
        _mm512_storeu_si512(panel, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
}

template <int panels>
void tile(const std::uint32_t* rows, const std::uint32_t* columns, std::int64_t size, std::int64_t lines, float* sum,
          std::int64_t ld, int valid_rows, __mmask16 last) {
    __m512 sums[kTileRows][panels];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 3
        for (int p = 0; p < panels; ++p) sums[r][p] = _mm512_setzero_ps();
    for (std::int64_t line = 0; line < lines; ++line) {
        __m512bh right[panels];
#pragma GCC unroll 3
        for (int p = 0; p < panels; ++p)
            right[p] = (__m512bh)_mm512_loadu_si512(columns + p * size + line * kGramColumns);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(rows[line * kGramColumns + r]));
#pragma GCC unroll 3
            for (int p = 0; p < panels; ++p) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], left, right[p]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
        if (r >= valid_rows) break;
#pragma GCC unroll 3
        for (int p = 0; p < panels; ++p) {
            float* at = sum + r * ld + p * kGramColumns;
            const __mmask16 mask = p + 1 == panels ? last : 0xffff;
            _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(sums[r][p], _mm512_maskz_loadu_ps(mask, at)));
        }
    }
}

void multiply(const std::uint32_t* packed, std::int64_t size, std::int64_t lines, std::int64_t panels,
              std::int64_t columns, float* sum, std::int64_t ld) {
    const int rows = columns < kGramColumns ? static_cast<int>(columns) : kGramColumns;
    for (std::int64_t p = 0; p < panels; p += kTilePanels) {
        const std::int64_t count = panels - p < kTilePanels ? panels - p : kTilePanels;
        const __mmask16 last = lanes(columns - (p + count - 1) * kGramColumns);
        for (int r = 0; r < rows; r += kTileRows) {
            const auto run = count == 3 ? tile<3> : count == 2 ? tile<2> : tile<1>;
            run(packed + r, packed + p * size, size, lines, sum + r * ld + p * kGramColumns, ld, rows - r, last);
        }
    }
}

}  // namespace

const Gram avx512_bf16_gram = {pack, multiply};

}  // namespace vllm_sparse::cpu
