// The kernel behind mma_linear.h: weights are the sparse operand (16 rows), tokens the dense one (8 columns).
//
// In bytes, the operands of m16n8k32 (16-bit numbers) and m16n8k64 (8-bit) are the same: a unit is 16 rows x 32 kept
// bytes of weights and 8 tokens x 64 bytes. Only positions differ. 8-bit weights with 16-bit tokens are widened in
// registers. Blocks copy stages of one or two packed steps ahead by cp.async and share all tiles' stages equally
// (Stream-K).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hopper_ptx.cuh"
#include "mma_linear.h"
#include "mma_ptx.cuh"

namespace vllm_sparse::mma {

constexpr int kRowBlock = 16;
constexpr int kTileBlocks = kTileRows / kRowBlock;
constexpr int kValueBytes = 1024;  // of one row block and step, 16 bytes per lane and piece
constexpr int kPieceBytes = 512;
// Of shared memory: it fits the smallest GPU's 99 KiB, and on the largest leaves room for a block of the next kernel,
// whose first weights travel while this one ends.
constexpr int kSharedBytes = 96 * 1024;

struct Params {
    const uint8_t* weight;
    const uint8_t* x;
    const float* x_scale;
    const int* x_zero;
    const float* channel_scale;
    const int* weight_sum;
    const uint16_t* bias;
    uint16_t* y;
    uint4* partials;
    int* counters;
    int m, n, k;
    int x_scale_stride;  // of zero points too: 1 per token, 0 for all
    bool bf16_out;
    int groups;         // scales per row and packed step
    int block_bytes;    // of one row block and packed step
    int steps;          // along k, of a stage each: what is divided among the blocks
    int token_tiles;    // consecutive tiles share their weights through L2
    int share, longer;  // steps of every block; the first `longer` blocks have one more
};

// What is multiplied, W values with X tokens, and what that means for a step.
template <typename W_, typename X_>
struct Operands {
    using W = W_;
    using X = X_;
    using Sum = std::conditional_t<std::is_same_v<X, int8_t>, int, float>;
    static constexpr bool kWiden = !std::is_same_v<W, X>;
    static constexpr int kUnits = kWiden ? 4 : 2;
    static constexpr int kUnitColumns = 64 / sizeof(X);
    static constexpr int kStepColumns = kUnits * kUnitColumns;
    static constexpr int kPositionWords = kUnits / 2 * (3 - sizeof(X));  // per lane
    static constexpr int kMostGroups = kWiden ? 4 : 0;
    static constexpr int kBlockBytes = kValueBytes + 128 * kPositionWords;  // without scales, 32 bytes per group
};

// What the number of packed steps along k is a multiple of.
template <typename O>
constexpr int kStepsMultiple = O::kWiden ? 1 : 2;

// kI x kJ instructions per warp; kTokenWarps of kWarps share the tile's tokens, the others its rows. A stage holds
// kSteps steps.
template <typename Operands_, int kI_, int kJ_, int kTokenWarps_, int kWarps_, int kSteps_>
struct Config {
    using O = Operands_;
    static constexpr int kI = kI_, kJ = kJ_, kTokenWarps = kTokenWarps_, kWarps = kWarps_, kSteps = kSteps_;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kTokens = 8 * kJ * kTokenWarps;
    static constexpr int kUnits = kSteps * O::kUnits;
    static constexpr int kTokenBytes = 64 * kUnits;  // of one token's stage
    static constexpr int kWeightStage = kSteps * kTileBlocks * (O::kBlockBytes + 32 * O::kMostGroups);
    static constexpr int kTokenStage = kTokens * kTokenBytes;
    static constexpr int kFit = kSharedBytes / (kWeightStage + kTokenStage);
    static constexpr int kStages = kFit < 8 ? kFit : 8;
    static constexpr int kBytes = kStages * (kWeightStage + kTokenStage) + 16;
    static_assert(kI * kWarps / kTokenWarps == kTileBlocks && kStages >= 3);
};

// ---- numbers --------------------------------------------------------------------------------------------------------

template <typename To, typename From>
__device__ __forceinline__ To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

template <typename X>
using PairOf = std::conditional_t<std::is_same_v<X, __half>, __half2, __nv_bfloat162>;

// Bytes 0 and 2 of a word, or 1 and 3 (kOdd), to two 16-bit numbers, exactly.
//
// int8: the number of exponent 7 (bf16) or 10 (fp16) whose mantissa ends in the low seven bits, less the one that ends
// in the sign bit, is low - 128 * sign.
template <typename X, bool kOdd>
__device__ __forceinline__ uint32_t widen(uint32_t word, int8_t) {
    constexpr uint32_t kMagic = std::is_same_v<X, __half> ? 0x64006400u : 0x43004300u;
    const uint32_t bytes = kOdd ? word >> 8 : word;
    const auto low = bit_cast<PairOf<X>>((bytes & 0x007f007fu) | kMagic);
    const auto sign = bit_cast<PairOf<X>>((bytes & 0x00800080u) | kMagic);
    return bit_cast<uint32_t>(__hsub2(low, sign));
}

// e4m3: exponent and mantissa moved to where X has them give the number times 2^-8 (fp16) or 2^-120 (bf16).
template <typename X, bool kOdd>
__device__ __forceinline__ uint32_t widen(uint32_t word, __nv_fp8_e4m3) {
    constexpr bool kHalf = std::is_same_v<X, __half>;
    constexpr int kShift = kHalf ? 1 : 4;
    constexpr uint32_t kMask = 0x7f007f00u >> kShift, kFactor = kHalf ? 0x5c005c00u : 0x7b807b80u;
    const uint32_t bytes = kOdd ? word : word << 8;
    const uint32_t small = (bytes & 0x80008000u) | ((bytes >> kShift) & kMask);
    return bit_cast<uint32_t>(__hmul2(bit_cast<PairOf<X>>(small), bit_cast<PairOf<X>>(kFactor)));
}

__device__ __forceinline__ float2 unpack(uint32_t word, __nv_bfloat16) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack(uint32_t word, __half) { return __half22float2(bit_cast<__half2>(word)); }

__device__ __forceinline__ uint32_t pack_pair(float low, float high, bool bf16) {
    return bf16 ? bit_cast<uint32_t>(__floats2bfloat162_rn(low, high))
                : bit_cast<uint32_t>(__floats2half2_rn(low, high));
}

// ---- division of work -----------------------------------------------------------------------------------------------

// Every block takes an equal, contiguous share of all tiles' steps. A tile cut by a share's edge is summed by the last
// block to finish its part, always in block order, so that the result does not depend on timing.
__device__ __forceinline__ int share_begin(int block, const Params& p) {
    return block * p.share + min(block, p.longer);
}

__device__ __forceinline__ int share_of(int step, const Params& p) {
    const int in_longer = p.longer * (p.share + 1);
    return step < in_longer ? step / (p.share + 1) : p.longer + (step - in_longer) / p.share;
}

// A step of this block's share.
struct Place {
    int row_tile, token_tile;
    int until;  // steps to the tile's end, this one too
    int left;   // to the share's end

    __device__ __forceinline__ explicit Place(const Params& p) {
        const int first = share_begin(blockIdx.x, p), tile = first / p.steps;
        left = share_begin(blockIdx.x + 1, p) - first;
        until = p.steps - (first - tile * p.steps);
        row_tile = tile / p.token_tiles;
        token_tile = tile - row_tile * p.token_tiles;
    }
    // Returns whether a new tile begins.
    __device__ __forceinline__ bool next(const Params& p) {
        --left;
        if (--until > 0) return false;
        until = p.steps;
        if (++token_tile == p.token_tiles) token_tile = 0, ++row_tile;
        return true;
    }
};

// ---- copies ---------------------------------------------------------------------------------------------------------

// What this thread copies, step after step: its part of the weights and of the tokens.
//
// Tokens lie in pieces of 16 bytes, piece ^ token % 8, so that a piece of eight tokens is in different banks. Beyond m
// and k they are zeros.
template <typename C>
class Feed {
 public:
    __device__ __forceinline__ Feed(const Params& p, const Place& place, uint32_t weight_stages, uint32_t token_stages)
        : ahead_(place),
          weights_to_(ptx::keep(weight_stages + 16 * threadIdx.x)),
          tokens_to_(ptx::keep(token_stages + threadIdx.x / kPieces * C::kTokenBytes +
                               (threadIdx.x % kPieces ^ (threadIdx.x / kPieces & 7)) * 16)),
          step_bytes_(C::kSteps * kTileBlocks * p.block_bytes),
          row_bytes_(p.k * static_cast<int>(sizeof(typename C::O::X))),
          weights_(p.weight + (static_cast<int64_t>(place.row_tile + 1) * p.steps - place.until) * step_bytes_ +
                   16 * threadIdx.x) {
        enter_tile(p);
    }

    // The weights of the first stages.
    __device__ __forceinline__ void begin_weights(const Params& p) {
        Place place = ahead_;
        for (int stage = 0; stage < C::kStages - 1 && place.left > 0; ++stage) {
            copy_weights(stage);
            next_weights(p, place, place.next(p));
        }
    }

    // Their tokens; each stage is a group of copies.
    __device__ __forceinline__ void begin_tokens(const Params& p) {
        for (int stage = 0; stage < C::kStages - 1; ++stage) {
            if (ahead_.left > 0) {
                copy_tokens(stage);
                next_tokens(p, ahead_.next(p));
            }
            ptx::copy_async_commit();
        }
    }

    // Both, of the next stage.
    __device__ __forceinline__ void copy(const Params& p, int stage) {
        if (ahead_.left > 0) {
            copy_weights(stage);
            copy_tokens(stage);
            const bool entered = ahead_.next(p);
            next_weights(p, ahead_, entered);
            next_tokens(p, entered);
        }
        ptx::copy_async_commit();
    }

 private:
    static constexpr int kPieces = C::kTokenBytes / 16, kRows = C::kThreads / kPieces;

    __device__ __forceinline__ static bool has_piece() {
        return C::kTokens >= kRows || threadIdx.x < C::kTokens * kPieces;
    }

    // Whether this thread's piece of its i-th token exists.
    __device__ __forceinline__ bool is_inside(int i) const { return column_ < row_bytes_ && i * kRows < tokens_left_; }

    __device__ __forceinline__ void copy_weights(int stage) const {
        const uint32_t to = weights_to_ + stage * C::kWeightStage;
#pragma unroll
        for (int i = 0; i < (C::kWeightStage + 16 * C::kThreads - 1) / (16 * C::kThreads); ++i) {
            const bool whole = 16 * (i + 1) * C::kThreads <= C::kSteps * kTileBlocks * C::O::kBlockBytes;
            if (whole || 16 * (i * C::kThreads + static_cast<int>(threadIdx.x)) < step_bytes_) {
                ptx::copy_async_16(to + 16 * i * C::kThreads, weights_ + 16 * i * C::kThreads, 16);
            }
        }
    }

    __device__ __forceinline__ void copy_tokens(int stage) const {
        const uint32_t to = tokens_to_ + stage * C::kTokenStage;
#pragma unroll
        for (int i = 0; i < (C::kTokens + kRows - 1) / kRows; ++i) {
            if (!has_piece()) break;
            ptx::copy_async_16(to + i * kRows * C::kTokenBytes, tokens_ + i * kRows * static_cast<int64_t>(row_bytes_),
                               is_inside(i) ? 16 : 0);
        }
    }

    // The steps of a tile follow those of the tile before, unless both are of the same rows.
    __device__ __forceinline__ void next_weights(const Params& p, const Place& place, bool entered) {
        weights_ += step_bytes_;
        if (entered && place.token_tile > 0) weights_ -= static_cast<int64_t>(p.steps) * step_bytes_;
    }

    __device__ __forceinline__ void next_tokens(const Params& p, bool entered) {
        tokens_ += C::kTokenBytes;
        column_ += C::kTokenBytes;
        if (entered) enter_tile(p);
    }

    __device__ __forceinline__ void enter_tile(const Params& p) {
        const int token = ahead_.token_tile * C::kTokens + threadIdx.x / kPieces;
        column_ = (p.steps - ahead_.until) * C::kTokenBytes + 16 * (threadIdx.x % kPieces);
        tokens_left_ = p.m - token;
        tokens_ = p.x + static_cast<int64_t>(token) * row_bytes_ + column_;
    }

    Place ahead_;
    uint32_t weights_to_, tokens_to_;  // in the first stage
    int step_bytes_, row_bytes_;
    const uint8_t* weights_;
    const uint8_t* tokens_;
    int tokens_left_;  // from this thread's first to the last
    int column_;       // in bytes
};

// ---- sums -----------------------------------------------------------------------------------------------------------

template <typename C>
using Sums = typename C::O::Sum[C::kI][C::kJ][4];

template <typename Sum, int kI, int kJ>
__device__ __forceinline__ void clear(Sum (&sums)[kI][kJ][4]) {
#pragma unroll
    for (int i = 0; i < kI; ++i) {
#pragma unroll
        for (int j = 0; j < kJ; ++j) sums[i][j][0] = sums[i][j][1] = sums[i][j][2] = sums[i][j][3] = 0;
    }
}

// The sparse operand of one unit.
template <typename O>
__device__ __forceinline__ void load_values(uint32_t (&a)[4], uint32_t from, int unit) {
    if constexpr (O::kWiden) {
        const uint2 words = ptx::load_shared_8(from + unit / 2 * kPieceBytes + 8 * (unit % 2));
        a[0] = widen<typename O::X, false>(words.x, typename O::W());
        a[1] = widen<typename O::X, true>(words.x, typename O::W());
        a[2] = widen<typename O::X, false>(words.y, typename O::W());
        a[3] = widen<typename O::X, true>(words.y, typename O::W());
    } else {
        const uint4 words = ptx::load_shared_16(from + unit * kPieceBytes);
        a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
    }
}

// A lane's positions of one step.
template <typename O>
__device__ __forceinline__ void load_positions(uint32_t (&words)[O::kPositionWords], uint32_t from) {
    if constexpr (O::kPositionWords == 2) {
        const uint2 pair = ptx::load_shared_8(from);
        words[0] = pair.x, words[1] = pair.y;
    } else {
        words[0] = ptx::load_shared_4(from);
    }
}

// sums += scales of a group * part, part = 0.
template <typename O, int kJ>
__device__ __forceinline__ void fold(float (&sums)[kJ][4], float (&part)[kJ][4], uint32_t scales) {
    const float2 scale = unpack(ptx::load_shared_4(scales), typename O::X());
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
        sums[j][0] += scale.x * part[j][0], sums[j][1] += scale.x * part[j][1];
        sums[j][2] += scale.y * part[j][2], sums[j][3] += scale.y * part[j][3];
        part[j][0] = part[j][1] = part[j][2] = part[j][3] = 0.f;
    }
}

// Where this thread reads its fragments in the first stage.
template <typename C>
struct Fragments {
    uint32_t values, positions, scales, tokens;

    __device__ __forceinline__ Fragments(const Params& p, uint32_t weight_stages, uint32_t token_stages) {
        using O = typename C::O;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const uint32_t block = weight_stages + warp / C::kTokenWarps * C::kI * p.block_bytes;
        values = ptx::keep(block + 16 * lane);
        positions = ptx::keep(block + kValueBytes + 4 * O::kPositionWords * lane);
        scales = O::kWiden ? ptx::keep(block + O::kBlockBytes + 4 * (lane / 4) * p.groups) : 0;
        tokens = ptx::keep(token_stages + (warp % C::kTokenWarps * 8 * C::kJ + lane % 8) * C::kTokenBytes +
                           16 * (lane / 8 ^ lane % 8));
    }
};

// part += one step; with group scales, sums += part at each group's end.
template <typename C>
__device__ __forceinline__ void multiply_step(const Params& p, typename C::O::Sum (&sums)[C::kI][C::kJ][4],
                                              typename C::O::Sum (&part)[C::kI][C::kJ][4], const Fragments<C>& from,
                                              int stage) {
    using O = typename C::O;
    const uint32_t weights = stage * C::kWeightStage, tokens = from.tokens + stage * C::kTokenStage;
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
        const uint32_t block = weights + step * kTileBlocks * p.block_bytes;
        uint32_t positions[C::kI][O::kPositionWords];
#pragma unroll
        for (int i = 0; i < C::kI; ++i) load_positions<O>(positions[i], from.positions + block + i * p.block_bytes);
#pragma unroll
        for (int unit = 0; unit < O::kUnits; ++unit) {
            const int piece = 4 * (step * O::kUnits + unit);  // the first of the unit's, before the swizzle
            uint32_t b[C::kJ][4];
#pragma unroll
            for (int j = 0; j < C::kJ; ++j) {
                ptx::load_matrices(b[j], (tokens ^ (piece % 8 * 16)) + piece / 8 * 128 + 8 * j * C::kTokenBytes);
            }
#pragma unroll
            for (int i = 0; i < C::kI; ++i) {
                uint32_t a[4];
                load_values<O>(a, from.values + block + i * p.block_bytes, unit);
                const uint32_t word = positions[i][sizeof(typename O::X) == 1 ? unit : unit / 2];
#pragma unroll
                for (int j = 0; j < C::kJ; ++j) ptx::mma_sparse(part[i][j], a, b[j], word, unit % 2, typename O::X());
                if constexpr (O::kWiden) {
                    const int ended = (unit + 1) * p.groups / O::kUnits;  // groups of the step
                    if (p.groups > 0 && (unit + 1) * p.groups % O::kUnits == 0) {
                        fold<O>(sums[i], part[i], from.scales + block + i * p.block_bytes + 4 * (ended - 1));
                    }
                }
            }
        }
    }
}

// ---- the end of a tile ----------------------------------------------------------------------------------------------

// One instruction's sums: rows g, g + 8 (lane / 4) from `row` of tokens 2 t, 2 t + 1 from `token0`.
template <typename Sum>
__device__ __forceinline__ void store_unit(const Params& p, const Sum (&c)[4], int row, int token0, float2 scale,
                                           float2 bias) {
    const int lane = threadIdx.x % 32, column = token0 + 2 * (lane % 4);
    float2 x_scale{1.f, 1.f};
    if (p.x_scale != nullptr) {
        x_scale.x = column < p.m ? p.x_scale[column * p.x_scale_stride] : 0.f;
        x_scale.y = column + 1 < p.m ? p.x_scale[(column + 1) * p.x_scale_stride] : 0.f;
    }
    const auto finish = [](Sum sum, float a, float b, float c) { return fmaf(static_cast<float>(sum) * a, b, c); };
    const uint32_t low = ptx::transpose_matrix(
        pack_pair(finish(c[0], scale.x, x_scale.x, bias.x), finish(c[1], scale.x, x_scale.y, bias.x), p.bf16_out));
    const uint32_t high = ptx::transpose_matrix(
        pack_pair(finish(c[2], scale.y, x_scale.x, bias.y), finish(c[3], scale.y, x_scale.y, bias.y), p.bf16_out));
    const int token = token0 + lane / 4;
    if (token < p.m) {
        uint32_t* y = reinterpret_cast<uint32_t*>(p.y + static_cast<int64_t>(token) * p.n + row) + lane % 4;
        y[0] = low;
        y[4] = high;
    }
}

// Channel scales and bias of this thread's rows.
template <typename C>
struct Channels {
    float2 scale[C::kI], bias[C::kI];

    __device__ __forceinline__ Channels(const Params& p, int row0) {
#pragma unroll
        for (int i = 0; i < C::kI; ++i) {
            const int row = row0 + i * kRowBlock + threadIdx.x % 32 / 4;
            scale[i] = {1.f, 1.f}, bias[i] = {0.f, 0.f};
            if (row >= p.n) continue;
            if (p.channel_scale != nullptr) scale[i] = {p.channel_scale[row], p.channel_scale[row + 8]};
            if (p.bias == nullptr) continue;
            const uint32_t pair = p.bias[row] | static_cast<uint32_t>(p.bias[row + 8]) << 16;
            bias[i] = p.bf16_out ? unpack(pair, __nv_bfloat16()) : unpack(pair, __half());
        }
    }
};

// The sum of (x - zero) * w is that of x * w less zero times the sum of w, exactly.
template <typename C>
__device__ __forceinline__ void subtract_zero_points(const Params& p, int (&sums)[C::kI][C::kJ][4], int row0,
                                                     int token0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < C::kI; ++i) {
        const int row = row0 + i * kRowBlock + lane / 4;
        if (row >= p.n) break;
        const int low = p.weight_sum[row], high = p.weight_sum[row + 8];
#pragma unroll
        for (int j = 0; j < 2 * C::kJ; ++j) {
            const int token = token0 + j / 2 * 8 + 2 * (lane % 4) + j % 2;
            const int zero = token < p.m ? p.x_zero[token * p.x_scale_stride] : 0;
            sums[i][j / 2][j % 2] -= zero * low;
            sums[i][j / 2][j % 2 + 2] -= zero * high;
        }
    }
}

template <typename C>
__device__ __forceinline__ void store_tile(const Params& p, Sums<C>& sums, const Channels<C>& channels, int row0,
                                           int token0) {
#pragma unroll
    for (int i = 0; i < C::kI; ++i) {
        const int row = row0 + i * kRowBlock;
        if (row >= p.n) break;
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            if (token0 + 8 * j >= p.m) break;
            store_unit(p, sums[i][j], row, token0 + 8 * j, channels.scale[i], channels.bias[i]);
        }
    }
}

// Leave the part of `tile` in the workspace; returns whether this block is its last, and then the sum of all parts.
template <typename C>
__device__ __forceinline__ bool add_parts(const Params& p, Sums<C>& sums, int tile, int tokens, int* last) {
    using Sum = typename C::O::Sum;
    const int first = share_of(tile * p.steps, p), final = share_of((tile + 1) * p.steps - 1, p);
    // A block leaves at most two parts: number 0 of a tile begun before its share, 1 of one that ends after it.
    const auto part = [&](int block) {
        return p.partials + static_cast<int64_t>(2 * block + (block == first)) * (C::kI * C::kJ * C::kThreads) +
               threadIdx.x;
    };
    uint4* mine = part(blockIdx.x);
#pragma unroll
    for (int i = 0; i < C::kI; ++i) {
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            const Sum(&c)[4] = sums[i][j];
            if (8 * j < tokens) {
                __stcg(mine + (i * C::kJ + j) * C::kThreads,
                       make_uint4(bit_cast<uint32_t>(c[0]), bit_cast<uint32_t>(c[1]), bit_cast<uint32_t>(c[2]),
                                  bit_cast<uint32_t>(c[3])));
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        // Releases what all threads of this block have written before the barrier, acquires what other blocks' have.
        *last = ptx::add_acquire_release(p.counters + first, 1) == final - first;
        if (*last) p.counters[first] = 0;
    }
    __syncthreads();
    if (!*last) return false;
    clear(sums);
#pragma unroll(C::kI* C::kJ >= 8 ? 1 : 4)
    for (int block = first; block <= final; ++block) {
        const uint4* parts = part(block);
#pragma unroll
        for (int i = 0; i < C::kI; ++i) {
#pragma unroll
            for (int j = 0; j < C::kJ; ++j) {
                if (8 * j >= tokens) continue;
                const uint4 c = __ldcg(parts + (i * C::kJ + j) * C::kThreads);
                sums[i][j][0] += bit_cast<Sum>(c.x), sums[i][j][1] += bit_cast<Sum>(c.y);
                sums[i][j][2] += bit_cast<Sum>(c.z), sums[i][j][3] += bit_cast<Sum>(c.w);
            }
        }
    }
    return true;
}

// Finish steps [begin, end) of the tile of `place`: store them if they are all, else add up what others have done.
template <typename C>
__device__ __forceinline__ void finish_tile(const Params& p, Sums<C>& sums, const Place& place, int begin, int end,
                                            int* last) {
    const int warp = threadIdx.x / 32;
    const int row0 = (place.row_tile * kTileBlocks + warp / C::kTokenWarps * C::kI) * kRowBlock;
    const int token0 = place.token_tile * C::kTokens + warp % C::kTokenWarps * 8 * C::kJ;
    const Channels<C> channels(p, row0);  // before waiting for others
    if (begin > 0 || end < p.steps) {
        // This thread's columns of instruction j exist while 8 j < tokens.
        const int tokens = p.m - token0 - 2 * static_cast<int>(threadIdx.x % 4);
        if (!add_parts<C>(p, sums, place.row_tile * p.token_tiles + place.token_tile, tokens, last)) return;
    }
    if constexpr (std::is_same_v<typename C::O::Sum, int>) {
        if (p.x_zero != nullptr) subtract_zero_points<C>(p, sums, row0, token0);
    }
    store_tile<C>(p, sums, channels, row0, token0);
}

// FP8 operands came with compute capability 8.9. Hopper and the large Blackwells have them for wgmma and tcgen05 alone,
// and take those of mma.sp apart into float16.
__host__ __device__ constexpr bool emulates_fp8(int capability) { return capability >= 90 && capability < 120; }
constexpr int kMostEmulatedTokens = 32;  // of a tile: more do not fit the registers

// Whether the GPU that is compiled for runs this instance.
template <typename C>
__host__ __device__ constexpr bool is_compiled() {
#ifdef __CUDA_ARCH__
    constexpr bool kFp8 = std::is_same_v<typename C::O::X, __nv_fp8_e4m3>;
    return !kFp8 || (__CUDA_ARCH__ >= 890 && (!emulates_fp8(__CUDA_ARCH__ / 10) || C::kTokens <= kMostEmulatedTokens));
#else
    return true;
#endif
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename C>
__device__ __forceinline__ void multiply(const Params& p) {
    extern __shared__ __align__(128) uint8_t shared[];
    using Sum = typename C::O::Sum;
    uint8_t* token_stages = shared + C::kStages * C::kWeightStage;
    int* last = reinterpret_cast<int*>(token_stages + C::kStages * C::kTokenStage);
    const uint32_t weight_address = ptx::shared_address(shared), token_address = ptx::shared_address(token_stages);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    ptx::launch_dependents();
#endif
    Place now(p);
    Feed<C> feed(p, now, weight_address, token_address);
    // Weights depend on no other kernel, so that the first of them travel while the previous kernel still runs.
    feed.begin_weights(p);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    ptx::wait_for_dependencies();
#endif
    feed.begin_tokens(p);
    const Fragments<C> fragments(p, weight_address, token_address);
    Sum part[C::kI][C::kJ][4], grouped[C::O::kWiden ? C::kI : 1][C::O::kWiden ? C::kJ : 1][4];
    clear(part), clear(grouped);
    int begin = p.steps - now.until, stage = 0;
    while (now.left > 0) {
        ptx::copy_async_wait_group<C::kStages - 2>();
        __syncthreads();
        if constexpr (C::O::kWiden) {
            multiply_step<C>(p, grouped, part, fragments, stage);
        } else {
            multiply_step<C>(p, part, part, fragments, stage);
        }
        feed.copy(p, stage == 0 ? C::kStages - 1 : stage - 1);
        stage = stage + 1 == C::kStages ? 0 : stage + 1;
        const Place done = now;
        if (!now.next(p) && now.left > 0) continue;
        if constexpr (C::O::kWiden) {
#pragma unroll
            for (int i = 0; i < C::kI * C::kJ * 4; ++i) {
                part[i / 4 / C::kJ][i / 4 % C::kJ][i % 4] += grouped[i / 4 / C::kJ][i / 4 % C::kJ][i % 4];
            }
            clear(grouped);
        }
        finish_tile<C>(p, part, done, begin, p.steps - done.until + 1, last);
        clear(part);
        begin = 0;
    }
}

// Blocks that a multiprocessor's registers must have room for.
template <typename C>
constexpr int least_blocks() {
#ifdef __CUDA_ARCH__
    if (std::is_same_v<typename C::O::X, __nv_fp8_e4m3> && emulates_fp8(__CUDA_ARCH__ / 10)) return 1;
#endif
    return C::O::kWiden && C::kTokens > 32 ? 1 : 2;
}

template <typename C>
__global__ __launch_bounds__(C::kThreads, least_blocks<C>()) void mma_linear_kernel(const __grid_constant__ Params p) {
    if constexpr (is_compiled<C>()) multiply<C>(p);
}

}  // namespace vllm_sparse::mma
