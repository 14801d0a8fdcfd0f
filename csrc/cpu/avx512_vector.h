// 16 channels in a 512-bit register, for both AVX-512 tiers.
#pragma once

#include <immintrin.h>

#include "panel.h"

namespace vllm_sparse::cpu {
namespace {

struct Avx512 {
    static constexpr int lanes = 16;
    using Float = __m512;
    using Int = __m512i;
    using Four = __m512;

    static Float zero() { return _mm512_setzero_ps(); }
    static Float one() { return _mm512_set1_ps(1); }
    static Int zero_int() { return _mm512_setzero_si512(); }
    static Int load(const void* p) { return _mm512_loadu_si512(p); }
    static void store(std::int32_t* p, Int i) { _mm512_storeu_si512(p, i); }
    static Int load_words(const std::uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Float load_float(const float* p) { return _mm512_loadu_ps(p); }
    static void store_float(float* p, Float f) { _mm512_storeu_ps(p, f); }
    static Four load_four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
    template <int n>
    static Int shl(Int i) {
        return _mm512_slli_epi32(i, n);
    }
    template <int n>
    static Int shr(Int i) {
        return _mm512_srli_epi32(i, n);
    }
    template <int n>
    static Int sar(Int i) {
        return _mm512_srai_epi32(i, n);
    }
    static Int and_(Int i, std::uint32_t mask) {
        return _mm512_and_si512(i, _mm512_set1_epi32(static_cast<int>(mask)));
    }
    static Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Float as_float(Int i) { return _mm512_castsi512_ps(i); }
    static Float to_float(Int i) { return _mm512_cvtepi32_ps(i); }
    static Float half_to_float(Int i) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(i)); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float pick(Four four, Int i) { return _mm512_permutevar_ps(four, i); }  // uses bits 0 and 1 alone

    // (i & 0x03030303) | 0x04040000: byte indices 0..3 for the first group, 4..7 for the second.
    static Int pair_positions(Int i) {
        return _mm512_ternarylogic_epi32(i, _mm512_set1_epi32(0x03030303), _mm512_set1_epi32(0x04040000), 0xea);
    }
    static Int dot(Int sum, const std::uint8_t* eight, Int picks, Int values) {
        long long columns;
        __builtin_memcpy(&columns, eight, sizeof columns);
        return _mm512_dpbusd_epi32(sum, _mm512_shuffle_epi8(_mm512_set1_epi64(columns), picks), values);
    }
};

}  // namespace
}  // namespace vllm_sparse::cpu
