// The packed 2:4 weight that every x86 tier reads, and the plain structs between the driver and the tiers.
//
// A stripe is 16 output channels; a panel is one stripe by 32 input columns (8 groups of four, 16 kept values per
// channel). A panel is one line of metadata and then lines of values, 64 bytes each; dword i of a line belongs to
// channel i. Panels of a stripe are contiguous along k, stripes follow each other.
//
// Formats that multiply in 16 or 32 bits: half e (16 bits) of a dword belongs to kept value e of a group.
//   metadata: bits 16e + 2g .. 16e + 2g + 1 = position of kept value e of group g
//   values:   with b bits each, line g / (16 / b), bits 16e + b * (g % (16 / b)) and up
// Formats that multiply in 8 bits take four kept values (two groups, one pair j) per dword:
//   metadata: byte i, bits 2j .. 2j + 1 = position of kept value i % 2 of group 2j + i / 2
//   values:   that value, int8: line j, byte i; w4a8: line j / 2, the low half of byte i for even j, else the high one
//
// Files compiled for one instruction set include only this, <immintrin.h> and headers whose functions are all in
// unnamed namespaces: an inline function with external linkage, compiled with AVX-512, could be the copy that the
// linker keeps for everyone.
#pragma once

#include <cstdint>

namespace vllm_sparse::cpu {

constexpr int kChannels = 16;  // output channels of a stripe
constexpr int kColumns = 32;   // input columns of a panel
constexpr int kGroups = kColumns / 4;
constexpr int kLine = 64;     // bytes of a line: one dword per channel
constexpr int kMaxRows = 16;  // tokens of the largest tile

enum class Format : int { bf16, fp16, fp8, w8a16, w4a16, int8, w4a8 };
constexpr int kFormats = 7;

enum class Dtype : int { f32, bf16, fp16 };

// How a tile of tokens is stored: four (formats of 16 bits) or eight (int8) consecutive columns of each row together,
// [k / 4][rows][4] or [k / 8][rows][8], so that one broadcast load gives the columns that a group selects from.
enum class Activation : int { f32, bf16, int8 };

// Rounding of the activations before they are stored. All but none divide by the row's scale first; int8_zero_point
// adds the row's zero point.
enum class Quantize : int { none, int8, int8_zero_point, fp8 };

// Codes of int8 activations: symmetric ones leave -128 out.
constexpr int kLowestCode = -128, kHighestCode = 127, kLowestSymmetricCode = -127;

namespace {

constexpr int value_bits(Format format) {
    if (format == Format::bf16 || format == Format::fp16) return 16;
    return format == Format::w4a16 || format == Format::w4a8 ? 4 : 8;
}

// Whether the format multiplies in 8 bits.
constexpr bool takes_int8(Format format) { return format == Format::int8 || format == Format::w4a8; }

constexpr int panel_bytes(Format format) { return kLine + kColumns / 2 * kChannels * value_bits(format) / 8; }

static_assert(panel_bytes(Format::bf16) == 576 && panel_bytes(Format::int8) == 320 &&
              panel_bytes(Format::w4a16) == 192);

}  // namespace

// One stripe of the weight against one tile of tokens over `panels` panels; adds to sums.
struct Block {
    const std::uint8_t* weight;  // first panel
    const void* scales;          // group scales of the first panel's group, 16 per group; null: one group
    const void* activations;     // the tile at the first panel's column
    void* sums;                  // [rows][16], float, or int32 for Format::int8
    std::int64_t panels;
    std::int64_t group_panels;  // panels that share a group scale
    Dtype scale_dtype;
};

// `count` columns of one row from `column` on, to their places in a tile.
struct PackRow {
    const void* x;               // the row's first column
    void* tile;                  // the tile's first element
    std::int64_t column, count;  // column % 32 == 0
    int row, rows;               // of the tile
    Dtype dtype;
    Activation activation;
    Quantize quantize;
    float scale;  // x / scale is what is rounded
    int zero;     // zero point of int8_zero_point, else 0
    int offset;   // added to int8 codes beside it
};

// A stripe's finished sums for some rows:
// (sum - (offset + row_zero) * weight_sum) * row_scale * channel_scale * factor + bias.
struct Finish {
    const void* sums;               // [rows][16]
    const void* weight_sums;        // [16], int32 for Format::int8, float for Format::w4a8, else null
    const float* row_scales;        // [rows], or null
    const std::int32_t* row_zeros;  // [rows], or null; only where `integer`
    const float* channel_scales;    // [16], or null
    const void* bias;               // [count] of dtype, or null
    void* y;                        // [rows][count], rows `stride` elements apart
    std::int64_t rows, stride;
    int count;  // channels of the stripe that exist
    float factor;
    int offset;
    bool integer;  // sums and weight_sums are int32
    Dtype dtype;
};

// The smallest and the largest of some numbers and 0.
struct Range {
    float lowest, highest;
};

using Multiply = void (*)(const Block&);

constexpr int kTiles = 5;  // 1, 2, 4, 8, 16 rows

constexpr int kGramColumns = 16;  // of a panel of activations, see calibrate.h

// The inner loops of `gram`. A panel holds 16 columns; each of its lines two tokens, the first one in the lower halves.
struct Gram {
    // `tokens` rows of x, `columns` of them left (fewer than 16 in the last panel), into one panel; zeros fill it up.
    void (*pack)(const std::uint16_t* x, std::int64_t tokens, std::int64_t stride, std::int64_t columns,
                 std::uint32_t* panel);
    // The first panel times each of `panels` panels `size` apart, over `lines` lines, added to `sum` with rows `ld`
    // apart. `columns` are left, as above.
    void (*multiply)(const std::uint32_t* packed, std::int64_t size, std::int64_t lines, std::int64_t panels,
                     std::int64_t columns, float* sum, std::int64_t ld);
};

// One loop over columns, see calibrate.h.
struct Columns {
    enum class Kind { sparsegpt, gptq, descent } kind;
    std::int64_t count, ld;
    float* weight;          // sparsegpt and gptq: improved in place; descent: the rounded weight
    const float* gradient;  // descent
    std::uint8_t* keep;     // sparsegpt: written; else read
    const float* scales;    // null: nothing is rounded
    const float* square;    // the factor of H^-1, upper; descent: H
    float* errors;          // written: errors; descent: changes
    float max_code;
    bool fp8;
};

// What one instruction set offers. Rows of `multiply` are chosen by format, columns by log2 of the tile's rows.
struct Tier {
    const char* name;
    int int8_offset;  // added to int8 activation codes: vpdpbusd wants them unsigned
    int max_rows;     // of a tile
    Multiply multiply[kFormats][kTiles];
    const Multiply (*multiply_bf16)[kTiles];  // the same from bf16 activations; null, or null entries: from float ones
    const Multiply* multiply_lowest;  // [kTiles], Format::int8 with activation codes of -128; null: multiply takes them
    Range (*range)(const void* x, Dtype dtype, std::int64_t k);  // of a row
    void (*pack)(const PackRow&);
    void (*finish)(const Finish&);
    const Gram* gram = nullptr;                                                           // null: there is none
    void (*columns)(const Columns&, std::int64_t, std::int64_t, std::int64_t) = nullptr;  // rows from, to, of
};

extern const Tier scalar_tier;
#if defined(__x86_64__)
extern const Tier avx2_tier;
extern const Tier avx512_tier;
extern const Multiply avx512_bf16_multiply[kFormats][kTiles];
extern const Gram avx512_bf16_gram;
void avx512_columns(const Columns& loop, std::int64_t from, std::int64_t to, std::int64_t n);
#elif defined(__aarch64__)
extern const Tier neon_tier;
#endif

}  // namespace vllm_sparse::cpu
