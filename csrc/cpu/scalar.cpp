// One channel at a time in standard C++: every machine, and what the other tiers are tested against.
#include "rows.h"
#include "select.h"

namespace vllm_sparse::cpu {
namespace {

struct Scalar {
    static constexpr int lanes = 1;
    using Float = float;
    using Int = std::uint32_t;
    using Four = const float*;

    static Float zero() { return 0; }
    static Float one() { return 1; }
    static Int zero_int() { return 0; }
    static Int load(const void* p) {
        Int i;
        std::memcpy(&i, p, sizeof i);
        return i;
    }
    static void store(std::int32_t* p, Int i) { *p = static_cast<std::int32_t>(i); }
    static Int load_words(const std::uint16_t* p) { return *p; }
    static Float load_float(const float* p) { return *p; }
    static void store_float(float* p, Float f) { *p = f; }
    static Four load_four(const float* p) { return p; }
    template <int n>
    static Int shl(Int i) {
        return i << n;
    }
    template <int n>
    static Int shr(Int i) {
        return i >> n;
    }
    template <int n>
    static Int sar(Int i) {
        return static_cast<Int>(static_cast<std::int32_t>(i) >> n);
    }
    static Int and_(Int i, std::uint32_t mask) { return i & mask; }
    static Int add_int(Int a, Int b) { return a + b; }
    static Float as_float(Int i) { return bits_as<float>(i); }
    static Float to_float(Int i) { return static_cast<float>(static_cast<std::int32_t>(i)); }
    static Float half_to_float(Int i) { return from_fp16(static_cast<std::uint16_t>(i)); }
    static Float add(Float a, Float b) { return a + b; }
    static Float fma(Float a, Float b, Float c) { return a * b + c; }
    static Float pick(Four four, Int i) { return four[i & 3]; }
    static Int pair_positions(Int i) { return (i & 0x03030303u) | 0x04040000u; }
    static Int dot(Int sum, const std::uint8_t* eight, Int picks, Int values) {
        for (int e = 0; e < 32; e += 8)
            sum += static_cast<Int>(static_cast<std::int8_t>(eight[picks >> e & 7]) *
                                    static_cast<std::int8_t>(values >> e));
        return sum;
    }
};

}  // namespace

const Tier scalar_tier = {
    "scalar",
    0,
    16,
    {VLLM_SPARSE_TILES_16(multiply_float, Scalar, Format::bf16),
     VLLM_SPARSE_TILES_16(multiply_float, Scalar, Format::fp16),
     VLLM_SPARSE_TILES_16(multiply_float, Scalar, Format::fp8),
     VLLM_SPARSE_TILES_16(multiply_float, Scalar, Format::w8a16),
     VLLM_SPARSE_TILES_16(multiply_float, Scalar, Format::w4a16),
     VLLM_SPARSE_TILES_16(multiply_pairs, Scalar, Format::int8),
     VLLM_SPARSE_TILES_16(multiply_pairs, Scalar, Format::w4a8)},
    nullptr,
    nullptr,
    range_of_row,
    pack_row,
    finish_rows,
};

}  // namespace vllm_sparse::cpu
