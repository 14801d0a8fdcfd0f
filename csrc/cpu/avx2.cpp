// AVX2, FMA and F16C: half a stripe at a time.
#include <immintrin.h>

#include "rows.h"
#include "select.h"

namespace vllm_sparse::cpu {
namespace {

struct Avx2 {
    static constexpr int lanes = 8;
    using Float = __m256;
    using Int = __m256i;
    using Four = __m256;

    static Float zero() { return _mm256_setzero_ps(); }
    static Float one() { return _mm256_set1_ps(1); }
    static Int zero_int() { return _mm256_setzero_si256(); }
    static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static void store(std::int32_t* p, Int i) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), i); }
    static Int load_words(const std::uint16_t* p) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static Float load_float(const float* p) { return _mm256_loadu_ps(p); }
    static void store_float(float* p, Float f) { _mm256_storeu_ps(p, f); }
    static Four load_four(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }
    template <int n>
    static Int shl(Int i) {
        return _mm256_slli_epi32(i, n);
    }
    template <int n>
    static Int shr(Int i) {
        return _mm256_srli_epi32(i, n);
    }
    template <int n>
    static Int sar(Int i) {
        return _mm256_srai_epi32(i, n);
    }
    static Int and_(Int i, std::uint32_t mask) {
        return _mm256_and_si256(i, _mm256_set1_epi32(static_cast<int>(mask)));
    }
    static Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Float as_float(Int i) { return _mm256_castsi256_ps(i); }
    static Float to_float(Int i) { return _mm256_cvtepi32_ps(i); }
    static Float half_to_float(Int i) {
        const Int words = and_(i, 0xffff);
        return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float pick(Four four, Int i) { return _mm256_permutevar_ps(four, i); }

    static Int pair_positions(Int i) { return _mm256_or_si256(and_(i, 0x03030303), _mm256_set1_epi32(0x04040000)); }

    // vpmaddubsw adds two products in saturating int16: |value| * sign(activation, value) is at most 2 * 128 * 127 =
    // 32,512 and cannot saturate, because activation codes are -127..127.
    static Int dot(Int sum, const std::uint8_t* eight, Int picks, Int values) {
        long long columns;
        __builtin_memcpy(&columns, eight, sizeof columns);
        const Int selected = _mm256_shuffle_epi8(_mm256_set1_epi64x(columns), picks);
        const Int pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(values), _mm256_sign_epi8(selected, values));
        return add_int(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

// Takes every code, and is slower: bytes widened to words, the even and the odd ones.
struct Avx2Lowest : Avx2 {
    static Int even(Int bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
    static Int odd(Int bytes) { return _mm256_srai_epi16(bytes, 8); }
    static Int dot(Int sum, const std::uint8_t* eight, Int picks, Int values) {
        long long columns;
        __builtin_memcpy(&columns, eight, sizeof columns);
        const Int selected = _mm256_shuffle_epi8(_mm256_set1_epi64x(columns), picks);
        const Int products = _mm256_madd_epi16(even(selected), even(values));
        return add_int(sum, add_int(products, _mm256_madd_epi16(odd(selected), odd(values))));
    }
};

const Multiply multiply_lowest[kTiles] = VLLM_SPARSE_TILES_8(multiply_pairs, Avx2Lowest, Format::int8);

}  // namespace

const Tier avx2_tier = {
    "avx2",
    0,
    8,  // sixteen rows of sums would fill the register file
    {VLLM_SPARSE_TILES_8(multiply_float, Avx2, Format::bf16), VLLM_SPARSE_TILES_8(multiply_float, Avx2, Format::fp16),
     VLLM_SPARSE_TILES_8(multiply_float, Avx2, Format::fp8), VLLM_SPARSE_TILES_8(multiply_float, Avx2, Format::w8a16),
     VLLM_SPARSE_TILES_8(multiply_float, Avx2, Format::w4a16), VLLM_SPARSE_TILES_8(multiply_pairs, Avx2, Format::int8),
     VLLM_SPARSE_TILES_8(multiply_pairs, Avx2, Format::w4a8)},
    nullptr,
    multiply_lowest,
    range_of_row,
    pack_row,
    finish_rows,
};

}  // namespace vllm_sparse::cpu
