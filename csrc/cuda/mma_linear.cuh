// The kernel behind mma_linear.h: weights are the sparse operand (16 rows), tokens the dense one (8 columns).
//
// In bytes, the operands of m16n8k32 (16-bit numbers) and m16n8k64 (8-bit) are the same: a unit is 16 rows x 32 kept
// bytes of weights and 8 tokens x 64 bytes. Only positions differ. 8-bit weights with 16-bit tokens are widened in
// registers. Blocks copy steps of kUnits units ahead by cp.async; they share all tiles' steps equally (Stream-K).
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
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSharedBytes = 96 * 1024;  // of 99 KiB on the smallest GPU

struct Params {
    const uint8_t* weight;
    const uint8_t* x;
    const float* x_scale;
    const float* channel_scale;
    const uint16_t* bias;
    uint16_t* y;
    uint4* partials;
    int* counters;
    int m, n, k;
    int x_scale_stride;  // 1 per token, 0 for all
    bool bf16_out;
    int groups;       // scales per row and step
    int block_bytes;  // of one row block and step
    int steps;        // along k
    int token_tiles;  // consecutive tiles share their weights through L2
    int tiles;        // row tiles * token_tiles
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
    static constexpr int kTokenBytes = 64 * kUnits;                      // of one token's step
    static constexpr int kPositionWords = kUnits / 2 * (3 - sizeof(X));  // per lane
    static constexpr int kMostGroups = kWiden ? 4 : 0;
    static constexpr int kBlockBytes = kValueBytes + 128 * kPositionWords;  // without scales, 32 bytes per group
};

// kI x kJ instructions per warp, kRowWarps x kTokenWarps warps.
template <typename Operands_, int kI_, int kJ_, int kTokenWarps_>
struct Config {
    using O = Operands_;
    static constexpr int kI = kI_, kJ = kJ_, kTokenWarps = kTokenWarps_;
    static constexpr int kTokens = 8 * kJ * kTokenWarps;
    static constexpr int kWeightStage = kTileBlocks * (O::kBlockBytes + 32 * O::kMostGroups);
    static constexpr int kTokenStage = kTokens * O::kTokenBytes;
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
    return static_cast<int>(static_cast<int64_t>(block) * p.tiles * p.steps / gridDim.x);
}

__device__ __forceinline__ int share_of(int step, const Params& p) {
    return static_cast<int>((static_cast<int64_t>(step + 1) * gridDim.x - 1) /
                            (static_cast<int64_t>(p.tiles) * p.steps));
}

// A step of this block's share.
struct Place {
    int row_tile, token_tile, step;
    int left;  // steps to the share's end, this one too

    __device__ __forceinline__ explicit Place(const Params& p) {
        const int first = share_begin(blockIdx.x, p), tile = first / p.steps;
        left = share_begin(blockIdx.x + 1, p) - first;
        step = first - tile * p.steps;
        row_tile = tile / p.token_tiles;
        token_tile = tile - row_tile * p.token_tiles;
    }
    __device__ __forceinline__ void next(const Params& p) {
        --left;
        if (++step < p.steps) return;
        step = 0;
        if (++token_tile == p.token_tiles) token_tile = 0, ++row_tile;
    }
};

// ---- copies ---------------------------------------------------------------------------------------------------------

template <typename C>
__device__ __forceinline__ void fetch_weights(const Params& p, Place& place, uint32_t to) {
    if (place.left <= 0) return;
    const int bytes = kTileBlocks * p.block_bytes;
    const uint8_t* from = p.weight + (static_cast<int64_t>(place.row_tile) * p.steps + place.step) * bytes;
#pragma unroll
    for (int i = 0; i < (C::kWeightStage + 16 * kThreads - 1) / (16 * kThreads); ++i) {
        const int at = 16 * (i * kThreads + threadIdx.x);
        if (at < bytes) ptx::copy_async_16(to + at, from + at, 16);
    }
    place.next(p);
}

// Pieces of 16 bytes, piece ^ token % 8, so that a piece of eight tokens lies in different banks. Zeros beyond m and k.
template <typename C>
__device__ __forceinline__ void fetch_tokens(const Params& p, Place& place, uint32_t to) {
    if (place.left <= 0) return;
    constexpr int kPieces = C::O::kTokenBytes / 16;
    const int row_bytes = p.k * static_cast<int>(sizeof(typename C::O::X));
    const int token0 = place.token_tile * C::kTokens;
#pragma unroll
    for (int i = 0; i < (C::kTokens * kPieces + kThreads - 1) / kThreads; ++i) {
        const int at = i * kThreads + threadIdx.x, token = at / kPieces, piece = at % kPieces;
        if (C::kTokens * kPieces % kThreads != 0 && token >= C::kTokens) break;
        const int column = place.step * C::O::kTokenBytes + 16 * piece;
        const bool inside = token0 + token < p.m && column < row_bytes;
        const uint8_t* from = p.x + (inside ? static_cast<int64_t>(token0 + token) * row_bytes + column : 0);
        ptx::copy_async_16(to + token * C::O::kTokenBytes + (piece ^ (token & 7)) * 16, from, inside ? 16 : 0);
    }
    place.next(p);
}

// ---- sums -----------------------------------------------------------------------------------------------------------

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
__device__ __forceinline__ void load_values(uint32_t (&a)[4], const uint8_t* block, int unit, int lane) {
    if constexpr (O::kWiden) {
        const uint2 words = reinterpret_cast<const uint2*>(block + unit / 2 * kPieceBytes)[2 * lane + unit % 2];
        a[0] = widen<typename O::X, false>(words.x, typename O::W());
        a[1] = widen<typename O::X, true>(words.x, typename O::W());
        a[2] = widen<typename O::X, false>(words.y, typename O::W());
        a[3] = widen<typename O::X, true>(words.y, typename O::W());
    } else {
        const uint4 words = reinterpret_cast<const uint4*>(block + unit * kPieceBytes)[lane];
        a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
    }
}

template <typename O>
__device__ __forceinline__ uint32_t load_positions(const uint8_t* block, int unit, int lane) {
    const int word = sizeof(typename O::X) == 1 ? unit : unit / 2;
    return reinterpret_cast<const uint32_t*>(block + kValueBytes)[lane * O::kPositionWords + word];
}

// sums += scales of a group * part, part = 0.
template <typename O, int kJ>
__device__ __forceinline__ void fold(float (&sums)[kJ][4], float (&part)[kJ][4], const uint8_t* scales, int group,
                                     int groups, int lane) {
    const float2 scale = unpack(reinterpret_cast<const uint32_t*>(scales)[lane / 4 * groups + group], typename O::X());
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
        sums[j][0] += scale.x * part[j][0], sums[j][1] += scale.x * part[j][1];
        sums[j][2] += scale.y * part[j][2], sums[j][3] += scale.y * part[j][3];
        part[j][0] = part[j][1] = part[j][2] = part[j][3] = 0.f;
    }
}

// part += one step; with group scales, sums += part at each group's end.
template <typename C>
__device__ __forceinline__ void multiply_step(const Params& p, typename C::O::Sum (&sums)[C::kI][C::kJ][4],
                                              typename C::O::Sum (&part)[C::kI][C::kJ][4], const uint8_t* weights,
                                              uint32_t tokens) {
    using O = typename C::O;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint8_t* block = weights + warp / C::kTokenWarps * C::kI * p.block_bytes;
    const uint32_t token_row = tokens + (warp % C::kTokenWarps * 8 * C::kJ + lane % 8) * O::kTokenBytes;
#pragma unroll
    for (int unit = 0; unit < O::kUnits; ++unit) {
        uint32_t b[C::kJ][4];
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            const int piece = (4 * unit + lane / 8) ^ (lane % 8);
            ptx::load_matrices(b[j], token_row + 8 * j * O::kTokenBytes + 16 * piece);
        }
#pragma unroll
        for (int i = 0; i < C::kI; ++i) {
            const uint8_t* mine = block + i * p.block_bytes;
            uint32_t a[4];
            load_values<O>(a, mine, unit, lane);
            const uint32_t positions = load_positions<O>(mine, unit, lane);
#pragma unroll
            for (int j = 0; j < C::kJ; ++j) {
                if (unit % 2 == 0) {
                    ptx::mma_sparse<0>(part[i][j], a, b[j], positions, typename O::X());
                } else {
                    ptx::mma_sparse<1>(part[i][j], a, b[j], positions, typename O::X());
                }
            }
            if constexpr (O::kWiden) {
                if ((unit + 1) * p.groups % O::kUnits == 0 && p.groups > 0) {
                    fold<O>(sums[i], part[i], mine + O::kBlockBytes, (unit + 1) * p.groups / O::kUnits - 1, p.groups,
                            lane);
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

__device__ __forceinline__ float2 load_bias(const Params& p, int row) {
    if (p.bias == nullptr) return {0.f, 0.f};
    const uint32_t pair = p.bias[row] | static_cast<uint32_t>(p.bias[row + 8]) << 16;
    return p.bf16_out ? unpack(pair, __nv_bfloat16()) : unpack(pair, __half());
}

template <typename C>
__device__ __forceinline__ void store_tile(const Params& p, typename C::O::Sum (&sums)[C::kI][C::kJ][4], int row0,
                                           int token0) {
#pragma unroll
    for (int i = 0; i < C::kI; ++i) {
        const int row = row0 + i * kRowBlock;
        if (row >= p.n) break;
        const int mine = row + threadIdx.x % 32 / 4;
        const float2 bias = load_bias(p, mine);
        const float2 scale =
            p.channel_scale == nullptr ? float2{1.f, 1.f} : float2{p.channel_scale[mine], p.channel_scale[mine + 8]};
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            if (token0 + 8 * j >= p.m) break;
            store_unit(p, sums[i][j], row, token0 + 8 * j, scale, bias);
        }
    }
}

// Leave the part of `tile` in the workspace; returns whether this block is its last, and then the sum of all parts.
template <typename C>
__device__ __forceinline__ bool add_parts(const Params& p, typename C::O::Sum (&sums)[C::kI][C::kJ][4], int tile,
                                          int tokens, int* last) {
    using Sum = typename C::O::Sum;
    const int first = share_of(tile * p.steps, p), final = share_of((tile + 1) * p.steps - 1, p);
    // A block leaves at most two parts: number 0 of a tile begun before its share, 1 of one that ends after it.
    const auto part = [&](int block) {
        return p.partials + static_cast<int64_t>(2 * block + (block == first)) * (C::kI * C::kJ * kThreads) +
               threadIdx.x;
    };
    uint4* mine = part(blockIdx.x);
#pragma unroll
    for (int i = 0; i < C::kI; ++i) {
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            const Sum(&c)[4] = sums[i][j];
            if (8 * j < tokens) {
                __stcg(mine + (i * C::kJ + j) * kThreads,
                       make_uint4(bit_cast<uint32_t>(c[0]), bit_cast<uint32_t>(c[1]), bit_cast<uint32_t>(c[2]),
                                  bit_cast<uint32_t>(c[3])));
            }
        }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *last = atomicAdd(p.counters + first, 1) == final - first;
        if (*last) p.counters[first] = 0;
        __threadfence();
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
                const uint4 c = __ldcg(parts + (i * C::kJ + j) * kThreads);
                sums[i][j][0] += bit_cast<Sum>(c.x), sums[i][j][1] += bit_cast<Sum>(c.y);
                sums[i][j][2] += bit_cast<Sum>(c.z), sums[i][j][3] += bit_cast<Sum>(c.w);
            }
        }
    }
    return true;
}

// Finish steps [begin, end) of the tile of `place`: store them if they are all, else add up what others have done.
template <typename C>
__device__ __forceinline__ void finish_tile(const Params& p, typename C::O::Sum (&sums)[C::kI][C::kJ][4],
                                            const Place& place, int begin, int end, int* last) {
    const int warp = threadIdx.x / 32;
    const int row0 = (place.row_tile * kTileBlocks + warp / C::kTokenWarps * C::kI) * kRowBlock;
    const int token0 = place.token_tile * C::kTokens + warp % C::kTokenWarps * 8 * C::kJ;
    if (begin > 0 || end < p.steps) {
        // This thread's columns of instruction j exist while 8 j < tokens.
        const int tokens = p.m - token0 - 2 * static_cast<int>(threadIdx.x % 4);
        if (!add_parts<C>(p, sums, place.row_tile * p.token_tiles + place.token_tile, tokens, last)) return;
    }
    store_tile<C>(p, sums, row0, token0);
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
    const uint32_t weights_to = ptx::shared_address(shared), tokens_to = ptx::shared_address(token_stages);
    Place now(p), weights = now, tokens = now;
    // Weights depend on no other kernel, so that the first of them travel while the previous kernel still runs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    ptx::launch_dependents();
#endif
    for (int stage = 0; stage < C::kStages - 1; ++stage) {
        fetch_weights<C>(p, weights, weights_to + stage * C::kWeightStage);
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    ptx::wait_for_dependencies();
#endif
    for (int stage = 0; stage < C::kStages - 1; ++stage) {
        fetch_tokens<C>(p, tokens, tokens_to + stage * C::kTokenStage);
        ptx::copy_async_commit();
    }
    Sum part[C::kI][C::kJ][4], grouped[C::O::kWiden ? C::kI : 1][C::O::kWiden ? C::kJ : 1][4];
    clear(part), clear(grouped);
    int begin = now.step, stage = 0;
    while (now.left > 0) {
        ptx::copy_async_wait_group<C::kStages - 2>();
        __syncthreads();
        const int freed = stage == 0 ? C::kStages - 1 : stage - 1;
        fetch_weights<C>(p, weights, weights_to + freed * C::kWeightStage);
        fetch_tokens<C>(p, tokens, tokens_to + freed * C::kTokenStage);
        ptx::copy_async_commit();
        const uint8_t* values = shared + stage * C::kWeightStage;
        if constexpr (C::O::kWiden) {
            multiply_step<C>(p, grouped, part, values, tokens_to + stage * C::kTokenStage);
        } else {
            multiply_step<C>(p, part, part, values, tokens_to + stage * C::kTokenStage);
        }
        stage = stage + 1 == C::kStages ? 0 : stage + 1;
        const Place done = now;
        now.next(p);
        if (now.left > 0 && now.step > 0) continue;
        if constexpr (C::O::kWiden) {
#pragma unroll
            for (int i = 0; i < C::kI * C::kJ * 4; ++i) {
                part[i / 4 / C::kJ][i / 4 % C::kJ][i % 4] += grouped[i / 4 / C::kJ][i / 4 % C::kJ][i % 4];
            }
            clear(grouped);
        }
        finish_tile<C>(p, part, done, begin, done.step + 1, last);
        clear(part);
        begin = 0;
    }
}

template <typename C>
__global__ __launch_bounds__(kThreads, 1) void mma_linear_kernel(const __grid_constant__ Params p) {
    if constexpr (is_compiled<C>()) multiply<C>(p);
}

}  // namespace vllm_sparse::mma
