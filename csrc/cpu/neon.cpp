// AArch64 with dot products (Armv8.2: Graviton 2, Apple M1 and later): a quarter of a stripe at a time.
#include <arm_neon.h>

#include "rows.h"
#include "select.h"

namespace vllm_sparse::cpu {
namespace {

struct Neon {
    static constexpr int lanes = 4;
    using Float = float32x4_t;
    using Int = uint32x4_t;
    using Four = uint8x16_t;

    static Float zero() { return vdupq_n_f32(0); }
    static Float one() { return vdupq_n_f32(1); }
    static Int zero_int() { return vdupq_n_u32(0); }
    static Int load(const void* p) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const std::uint8_t*>(p))); }
    static void store(std::int32_t* p, Int i) { vst1q_s32(p, vreinterpretq_s32_u32(i)); }
    static Int load_words(const std::uint16_t* p) { return vmovl_u16(vld1_u16(p)); }
    static Float load_float(const float* p) { return vld1q_f32(p); }
    static void store_float(float* p, Float f) { vst1q_f32(p, f); }
    static Four load_four(const float* p) { return vreinterpretq_u8_f32(vld1q_f32(p)); }
    template <int n>
    static Int shl(Int i) {
        return vshlq_n_u32(i, n);
    }
    template <int n>
    static Int shr(Int i) {
        if constexpr (n == 0) return i;  // the instruction starts at one
        if constexpr (n != 0) return vshrq_n_u32(i, n);
    }
    template <int n>
    static Int sar(Int i) {
        return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(i), n));
    }
    static Int and_(Int i, std::uint32_t mask) { return vandq_u32(i, vdupq_n_u32(mask)); }
    static Int add_int(Int a, Int b) { return vaddq_u32(a, b); }
    static Float as_float(Int i) { return vreinterpretq_f32_u32(i); }
    static Float to_float(Int i) { return vcvtq_f32_s32(vreinterpretq_s32_u32(i)); }
    static Float half_to_float(Int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(i))); }
    static Float add(Float a, Float b) { return vaddq_f32(a, b); }
    static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }

    // Position p of a float is bytes 4p .. 4p + 3 of the table.
    static Float pick(Four four, Int i) {
        const Int bytes = vmlaq_u32(vdupq_n_u32(0x03020100), and_(i, 3), vdupq_n_u32(0x04040404));
        return vreinterpretq_f32_u8(vqtbl1q_u8(four, vreinterpretq_u8_u32(bytes)));
    }
    static Int pair_positions(Int i) { return vorrq_u32(and_(i, 0x03030303), vdupq_n_u32(0x04040000)); }
    static Int dot(Int sum, const std::uint8_t* eight, Int picks, Int values) {
        const uint8x16_t columns = vcombine_u8(vld1_u8(eight), vdup_n_u8(0));
        const uint8x16_t selected = vqtbl1q_u8(columns, vreinterpretq_u8_u32(picks));
        return vreinterpretq_u32_s32(
            vdotq_s32(vreinterpretq_s32_u32(sum), vreinterpretq_s8_u8(selected), vreinterpretq_s8_u32(values)));
    }
};

}  // namespace

const Tier neon_tier = {
    "neon",
    0,
    16,
    {VLLM_SPARSE_TILES_16(multiply_float, Neon, Format::bf16), VLLM_SPARSE_TILES_16(multiply_float, Neon, Format::fp16),
     VLLM_SPARSE_TILES_16(multiply_float, Neon, Format::fp8), VLLM_SPARSE_TILES_16(multiply_float, Neon, Format::w8a16),
     VLLM_SPARSE_TILES_16(multiply_float, Neon, Format::w4a16),
     VLLM_SPARSE_TILES_16(multiply_pairs, Neon, Format::int8),
     VLLM_SPARSE_TILES_16(multiply_pairs, Neon, Format::w4a8)},
    nullptr,
    nullptr,
    range_of_row,
    pack_row,
    finish_rows,
};

}  // namespace vllm_sparse::cpu
