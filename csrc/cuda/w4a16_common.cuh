// What the two W4A16 kernels share: the packed layout, the division of work, the codes' conversion and the epilogue.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "hopper_ptx.cuh"
#include "launch.h"
#include "pairs.cuh"
#include "w4a16.h"

namespace vllm_sparse::w4a16 {

constexpr int kStep = kW4A16Step;
constexpr int kUnits = kStep / 32;  // one unit: 16 rows x 32 columns, the shape of one sparse MMA
constexpr int kRowBlock = kW4A16RowBlock;
constexpr int kPanelBlocks = kW4A16Panel / kRowBlock;
constexpr int kUnitBlocks = 64 / kRowBlock;  // rows of one wgmma
constexpr int kCodeBytes = 512;              // per row block and step: 4 words per lane, one per unit
constexpr int kPositionBytes = 256;          // 2 words per lane, one per pair of units

// The workspace: a counter per block and two parts of a tile per block.
constexpr size_t kPartBytes = kW4A16Panel * 32 * sizeof(float);

// Bytes of 16 rows x 128 columns: codes, positions, then per row pair (g, g + 8) the scales of each group.
template <int kGroups>
constexpr int kBlockBytes = kCodeBytes + kPositionBytes + 32 * kGroups;

struct Params {
    const uint8_t* weight;
    const uint8_t* x;
    const float* channel_scale;
    const void* bias;
    void* y;
    float* partials;
    int* counters;
    float unit;  // what the sums are multiplied by
    int m, n, k;
    int rows;         // tokens that a copy fetches, no more than there are: zeros cost the copy engine more than tokens
    int steps;        // steps along k
    int token_tiles;  // tiles along m; consecutive tiles share their weights through L2
    int tiles;        // row tiles * token_tiles
    int slices;       // Sliced: how many blocks (one cluster) share the steps of a tile
    int share;        // StreamK: steps of a block; Sliced: units of a row tile
    int longer;       // how many of them, the first ones, have one more
    // Which features a row block's rows are: g and g + 8, or g of the layer's first half and g of its second.
    int halves;    // 0 or 1
    int apart;     // features from one to the other
    bool gated;    // silu(first) * second is stored
    int features;  // of a token in y
};

// Where a tile lies.
struct Place {
    int block, blocks;  // the first row block, how many
    int token;          // the first token
};

// A block's work: for each of its tiles the steps [begin, end).
//
// Stream-K: every block takes an equal, contiguous share of all tiles' steps. A tile cut by a share's edge is summed by
// the last block to finish its part, always in block order, so that the result does not depend on timing.

__device__ __forceinline__ int share_begin(int block, const Params& p) {
    return block * p.share + min(block, p.longer);
}

__device__ __forceinline__ int share_of(int step, const Params& p) {
    const int in_longer = p.longer * (p.share + 1);
    return step < in_longer ? step / (p.share + 1) : p.longer + (step - in_longer) / p.share;
}

template <int kBlocks, int kTokens>
struct StreamK {
    int tile, begin, end, left;

    __device__ __forceinline__ explicit StreamK(const Params& p) {
        const int step = share_begin(blockIdx.x, p);
        left = share_begin(blockIdx.x + 1, p) - step;
        tile = step / p.steps;
        begin = step - tile * p.steps;
        end = min(p.steps, begin + left);
    }
    __device__ __forceinline__ bool valid(const Params&) const { return left > 0; }
    __device__ __forceinline__ void next(const Params& p) {
        left -= end - begin;
        ++tile;
        begin = 0;
        end = min(p.steps, left);
    }
    __device__ __forceinline__ Place place(const Params& p) const {
        const int row_tile = tile / p.token_tiles, block = row_tile * kBlocks;
        return {block, min(kBlocks, p.n / kRowBlock - block), (tile - row_tile * p.token_tiles) * kTokens};
    }
};

// Sliced: row tiles are of one or two heights, so that all rounds are full: the first ones have one unit of kUnit row
// blocks more. They need not be the rows of one panel. The blocks of a cluster share a tile, each a slice of its steps.
//
// The last of several token tiles is moved back to end with the last token. Tokens that are in two tiles are stored
// twice, with the same bits, as every tile has the same slices. (Stream-K cuts each tile elsewhere.)
template <int kTokens, int kUnit>
struct Sliced {
    int tile, begin, end;

    __device__ __forceinline__ explicit Sliced(const Params& p) {
        tile = blockIdx.x / p.slices;
        const int rank = blockIdx.x - tile * p.slices;
        begin = rank * p.steps / p.slices;
        end = (rank + 1) * p.steps / p.slices;
    }
    __device__ __forceinline__ bool valid(const Params& p) const { return tile < p.tiles; }
    __device__ __forceinline__ void next(const Params& p) { tile += gridDim.x / p.slices; }
    __device__ __forceinline__ Place place(const Params& p) const {
        const int row_tile = tile / p.token_tiles, block = share_begin(row_tile, p) * kUnit;
        const int blocks = share_begin(row_tile + 1, p) * kUnit - block;
        return {block, min(blocks, p.n / kRowBlock - block),
                min((tile - row_tile * p.token_tiles) * kTokens, p.m - p.rows)};
    }
};

// Follows the packed weights of consecutive steps of `blocks` row blocks of one panel.
template <int kGroups>
struct Walk {
    const uint8_t* weight;
    int64_t stride;  // bytes to the next step's
    int bytes;

    __device__ __forceinline__ Walk(const Params& p, int block, int blocks, int step) {
        const int panel = block / kPanelBlocks * kPanelBlocks,
                  panel_blocks = min(kPanelBlocks, p.n / kRowBlock - panel);
        const int64_t at =
            static_cast<int64_t>(panel) * p.steps + static_cast<int64_t>(step) * panel_blocks + (block - panel);
        weight = p.weight + at * kBlockBytes<kGroups>;
        stride = static_cast<int64_t>(panel_blocks) * kBlockBytes<kGroups>;
        bytes = blocks * kBlockBytes<kGroups>;
    }
};

// ---- numbers -------------------------------------------------------------------------------------------------------

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
    using type = __nv_bfloat162;
};
template <>
struct Pair<__half> {
    using type = __half2;
};

template <typename To, typename From>
__device__ __forceinline__ To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

__device__ __forceinline__ uint32_t mask_or(uint32_t a, uint32_t mask, uint32_t magic) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(mask), "r"(magic));
    return result;
}

// Eight codes (biased by 8, nibble r of each half-word belongs to register r) to the sparse operand's four registers.
//
// bfloat16: below 2^-125 floats are evenly spaced, by 2^-133, so that any byte in a half-word's low bits is that many
// 2^-133: a nibble needs no exponent of its own, in either half of the byte, and one exact multiplication and addition
// makes it (code - 8) / 128. The sums are multiplied by kCodeUnit.
template <typename T>
constexpr float kCodeUnit = std::is_same_v<T, __nv_bfloat16> ? 128.f : 1.f;

__device__ __forceinline__ void decode(uint32_t codes, uint32_t (&a)[4], __nv_bfloat162 low, __nv_bfloat162 high,
                                       __nv_bfloat162 low_bias, __nv_bfloat162 high_bias) {
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
        const uint32_t shifted = codes >> (4 * r);
        a[r] = bit_cast<uint32_t>(__hfma2(bit_cast<__nv_bfloat162>(shifted & 0x000f000fu), low, low_bias));
        a[r + 1] = bit_cast<uint32_t>(__hfma2(bit_cast<__nv_bfloat162>(shifted & 0x00f000f0u), high, high_bias));
    }
}

__device__ __forceinline__ void decode(uint32_t codes, uint32_t (&a)[4], __nv_bfloat16) {
    const auto low = bit_cast<__nv_bfloat162>(0x7e807e80u),
               high = bit_cast<__nv_bfloat162>(0x7c807c80u);  // 2^126, 2^122
    const auto bias = bit_cast<__nv_bfloat162>(0xbd80bd80u);  // -8 / 128
    decode(codes, a, low, high, bias, bias);
}

// float16: setting a float's exponent so that its last mantissa bits count ones turns a nibble into 1024 + code;
// subtracting is exact.
__device__ __forceinline__ void decode(uint32_t codes, uint32_t (&a)[4], __half) {
    const auto low_bias = bit_cast<__half2>(0x64086408u);   // 1024 + 8
    const auto sixteenth = bit_cast<__half2>(0x2c002c00u);  // 1 / 16
    const auto high_bias = bit_cast<__half2>(0xd480d480u);  // -(64 + 8)
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
        const uint32_t shifted = codes >> (4 * r);
        a[r] = bit_cast<uint32_t>(__hsub2(bit_cast<__half2>(mask_or(shifted, 0x000f000fu, 0x64006400u)), low_bias));
        const auto high = bit_cast<__half2>(mask_or(shifted, 0x00f000f0u, 0x64006400u));
        a[r + 1] = bit_cast<uint32_t>(__hfma2(high, sixteenth, high_bias));
    }
}

__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

// ---- synchronisation and copies
// --------------------------------------------------------------------------------------

using ptx::shared_address;

// Dynamic shared memory from its first multiple of 1024 bytes, which the tokens' swizzle wants.
__device__ __forceinline__ char* align_shared(char* shared) { return shared + (-shared_address(shared) & 1023); }

template <int kThreads>
__device__ __forceinline__ void consumer_barrier() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

constexpr int kProducers = 3;  // warps of which one thread copies, on sm_90 and later; one more where tiles span panels

// The shared memory of a block: kStages token tiles, kStages weight slices, the barriers, one word for finish_tile.
template <int kTokenBytes_, int kWeightBytes_, int kStages_>
struct Shared {
    static constexpr int kTokenBytes = kTokenBytes_, kWeightBytes = kWeightBytes_, kStages = kStages_;
    static constexpr int kWeights = kStages * kTokenBytes;
    static constexpr int kFull = kWeights + kStages * kWeightBytes;
    static constexpr int kEmpty = kFull + 8 * kStages;
    static constexpr int kLast = kEmpty + 8 * kStages;
    static constexpr int kBytes = kLast + 16 + 1024;  // 1024: alignment of the tokens' swizzle
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void tensor_copy(uint32_t to, const CUtensorMap* map, int column, int token,
                                            uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
        "{%2, %3}], "
        "[%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(token), "r"(barrier), "l"(policy)
        : "memory");
}

template <typename S>
__device__ __forceinline__ void init_barriers(uint32_t shared, int consumers) {
    for (int stage = 0; stage < S::kStages; ++stage) {
        ptx::barrier_init(shared + S::kFull + 8 * stage, 1);
        ptx::barrier_init(shared + S::kEmpty + 8 * stage, consumers);
    }
    ptx::barrier_init_fence();
}

// Copy what the block's work needs, as stages become free: producer 0 the weights, 1 and 2 the halves of the tokens, 3
// the weights of a tile's rows that lie in the next panel, since one thread issuing all of it is slower than the
// memory. `after_tile` runs when a tile's copies are issued. Weights do not depend on the previous kernel, so the first
// of them are asked for before waiting for it.
template <typename S, typename Work, int kGroups, typename AfterTile>
__device__ __forceinline__ void produce_weights(const Params& p, uint32_t shared, bool next_panel,
                                                AfterTile after_tile) {
    const uint64_t policy = p.token_tiles > 1 ? ptx::policy_evict_last() : ptx::policy_evict_first();
    int stage = 0;
    uint32_t parity = 1;  // nobody waits for a stage's first use
    for (Work work(p); work.valid(p); work.next(p)) {
        const Place place = work.place(p);
        const int upper = min(place.blocks, kPanelBlocks - place.block % kPanelBlocks), lower = place.blocks - upper;
        const int skip = next_panel ? upper : 0;
        Walk<kGroups> walk(p, place.block + skip, next_panel ? lower : upper, work.begin);
        for (int step = work.begin; step < work.end; ++step, walk.weight += walk.stride) {
            ptx::barrier_wait(shared + S::kEmpty + 8 * stage, parity);
            const uint32_t full = shared + S::kFull + 8 * stage;
            const uint32_t to = shared + S::kWeights + stage * S::kWeightBytes + skip * kBlockBytes<kGroups>;
            if (!next_panel) {
                ptx::barrier_arrive_expect(full, place.blocks * kBlockBytes<kGroups> + 2 * kStep * p.rows);
                ptx::copy_bulk(to, walk.weight, walk.bytes, full, policy);
            } else if (walk.bytes > 0) {
                ptx::copy_bulk(to, walk.weight, walk.bytes, full, policy);
            }
            if (++stage == S::kStages) stage = 0, parity ^= 1;
        }
        after_tile();
    }
}

template <typename S, typename Work, typename AfterTile>
__device__ __forceinline__ void produce_tokens(const Params& p, const CUtensorMap* token_map, uint32_t shared, int half,
                                               AfterTile after_tile) {
    const uint64_t policy = ptx::policy_evict_last();
    ptx::prefetch_map(token_map);
    ptx::wait_for_dependencies();
    int stage = 0;
    uint32_t parity = 1;
    for (Work work(p); work.valid(p); work.next(p)) {
        const Place place = work.place(p);
        for (int step = work.begin; step < work.end; ++step) {
            ptx::barrier_wait(shared + S::kEmpty + 8 * stage, parity);
            tensor_copy(shared + stage * S::kTokenBytes + half * (S::kTokenBytes / 2), token_map,
                        step * kStep + half * (kStep / 2), place.token, shared + S::kFull + 8 * stage, policy);
            if (++stage == S::kStages) stage = 0, parity ^= 1;
        }
        after_tile();
    }
}

template <typename S, typename Work, int kGroups, typename AfterTile>
__device__ __forceinline__ void produce(const Params& p, const CUtensorMap* token_map, uint32_t shared, int producer,
                                        AfterTile after_tile) {
    if (producer == 0 || producer == 3) {
        produce_weights<S, Work, kGroups>(p, shared, producer == 3, after_tile);
    } else {
        produce_tokens<S, Work>(p, token_map, shared, producer - 1, after_tile);
    }
}
#endif

// ---- epilogue
// --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t fragment) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
    return result;
}

// Where a thread's accumulators lie: acc[i][j][..] belongs to row block `first + i * stride` and tokens 8 j ... 8 j
// + 7.
struct Rows {
    int first, stride;
};

// Which features the 16 rows of a row block are: as the problem says, or known to be consecutive.
struct AnyOrder {
    static __device__ __forceinline__ int first(const Params& p, int row) { return row >> p.halves; }
    static __device__ __forceinline__ int apart(const Params& p) { return p.apart; }
    static __device__ __forceinline__ int features(const Params& p) { return p.features; }
    static __device__ __forceinline__ bool gated(const Params& p) { return p.gated; }
};
struct RowOrder {
    static __device__ __forceinline__ int first(const Params&, int row) { return row; }
    static __device__ __forceinline__ int apart(const Params&) { return kRowBlock / 2; }
    static __device__ __forceinline__ int features(const Params& p) { return p.n; }
    static __device__ __forceinline__ bool gated(const Params&) { return false; }
};

// Calls `finish` with the problem's order, whose type is what counts: most layers' rows are consecutive, and a chain
// that knows it ends sooner by a hundredth of the layer's time.
template <typename Finish>
__device__ __forceinline__ void with_order(const Params& p, const Finish& finish) {
    if (p.halves) {
        finish(AnyOrder());
    } else {
        finish(RowOrder());
    }
}

// One MMA tile of 16 packed rows from `row` and 8 tokens from `token0`: c holds rows g, g + 8 (lane / 4) of tokens 2 t,
// 2 t + 1.
template <typename T, typename Order = AnyOrder>
__device__ __forceinline__ void store_unit(const Params& p, const float (&c)[4], int row, int token0, float2 scale,
                                           float2 bias) {
    const int lane = threadIdx.x % 32, token = token0 + lane / 4;
    uint32_t low = pack(c[0] * scale.x + bias.x, c[1] * scale.x + bias.x, T());
    uint32_t high = pack(c[2] * scale.y + bias.y, c[3] * scale.y + bias.y, T());
    if (Order::gated(p)) low = silu_multiply<T>(low, high);
    low = transpose_8x8(low), high = transpose_8x8(high);
    if (token >= p.m) return;
    const int64_t at = static_cast<int64_t>(token) * Order::features(p) + Order::first(p, row);
    uint32_t* y = static_cast<uint32_t*>(p.y) + at / 2 + lane % 4;
    *y = low;
    if (!Order::gated(p)) y[Order::apart(p) / 2] = high;
}

template <typename Order = AnyOrder>
__device__ __forceinline__ float2 load_channel_scale(const Params& p, int row) {
    if (p.channel_scale == nullptr) return {p.unit, p.unit};
    const float* scale = p.channel_scale + Order::first(p, row) + threadIdx.x % 32 / 4;
    return {p.unit * scale[0], p.unit * scale[Order::apart(p)]};
}

template <typename T, typename Order = AnyOrder>
__device__ __forceinline__ float2 load_bias(const Params& p, int row) {
    if (p.bias == nullptr) return {0.f, 0.f};
    const T* bias = static_cast<const T*>(p.bias) + Order::first(p, row) + threadIdx.x % 32 / 4;
    return {to_float(bias[0]), to_float(bias[Order::apart(p)])};
}

template <typename T, typename Order = AnyOrder, int kI, int kJ>
__device__ __forceinline__ void store_tile(const Params& p, float (&acc)[kI][kJ][4], const Place& place, Rows rows) {
    const int token0 = place.token;
#pragma unroll
    for (int i = 0; i < kI; ++i) {
        const int block = rows.first + i * rows.stride, row = (place.block + block) * kRowBlock;
        if (block >= place.blocks) continue;
        const float2 scale = load_channel_scale<Order>(p, row), bias = load_bias<T, Order>(p, row);
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
            if (token0 + 8 * j >= p.m) break;
            store_unit<T, Order>(p, acc[i][j], row, token0 + 8 * j, scale, bias);
        }
    }
}

// Finish the part [begin, end) of `tile`: store it if it is whole, else leave it in the workspace, and let the last
// block of the tile add the parts up. kThreads threads take part, `thread` numbers them, `last` is a shared word.
template <typename T, int kThreads, int kI, int kJ>
__device__ __forceinline__ void finish_tile(const Params& p, float (&acc)[kI][kJ][4], int tile, int begin, int end,
                                            const Place& place, Rows rows, int thread, int* last) {
    if (begin == 0 && end == p.steps) {
        store_tile<T>(p, acc, place, rows);
        return;
    }
    const int token0 = place.token;
    constexpr int kSlot = kI * kJ * kThreads;  // float4 per part
    const int first = share_of(tile * p.steps, p), final = share_of((tile + 1) * p.steps - 1, p);
    // A block leaves at most two parts: number 0 of a tile begun before its share, number 1 of a tile that ends after
    // it.
    const auto slot = [&](int block) {
        return reinterpret_cast<float4*>(p.partials) + static_cast<int64_t>(2 * block + (block == first)) * kSlot +
               thread;
    };
    const int tokens =
        p.m - token0 - 2 * (threadIdx.x % 4);  // this thread's columns of tile j exist while 8 j < tokens
    float4* mine = slot(blockIdx.x);
#pragma unroll
    for (int i = 0; i < kI; ++i) {
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
            const float (&c)[4] = acc[i][j];
            if (8 * j < tokens) __stcg(mine + (i * kJ + j) * kThreads, make_float4(c[0], c[1], c[2], c[3]));
        }
    }
    __threadfence();
    consumer_barrier<kThreads>();
    if (thread == 0) {
        const int arrived = atomicAdd(p.counters + first, 1);
        *last = arrived == final - first;
        if (*last) p.counters[first] = 0;
        __threadfence();
    }
    consumer_barrier<kThreads>();
    if (!*last) return;
#pragma unroll
    for (int i = 0; i < kI; ++i) {
#pragma unroll
        for (int j = 0; j < kJ; ++j) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.f;
    }
#pragma unroll(kI* kJ >= 8 ? 1 : 4)
    for (int block = first; block <= final; ++block) {
        const float4* parts = slot(block);
#pragma unroll
        for (int i = 0; i < kI; ++i) {
#pragma unroll
            for (int j = 0; j < kJ; ++j) {
                if (8 * j < tokens) {
                    const float4 part = __ldcg(parts + (i * kJ + j) * kThreads);
                    acc[i][j][0] += part.x, acc[i][j][1] += part.y, acc[i][j][2] += part.z, acc[i][j][3] += part.w;
                }
                if (j % 8 == 7) asm volatile("" ::: "memory");  // no more loads at once than there are registers for
            }
        }
    }
    store_tile<T>(p, acc, place, rows);
}

// ---- host
// ------------------------------------------------------------------------------------------------------------

inline Params make_params(const W4A16Problem& problem, int tile_rows, int tile_tokens) {
    Params p;
    p.weight = static_cast<const uint8_t*>(problem.weight);
    p.x = static_cast<const uint8_t*>(problem.x);
    p.channel_scale = problem.channel_scale;
    p.unit = problem.bf16 ? kCodeUnit<__nv_bfloat16> : kCodeUnit<__half>;
    p.bias = problem.bias;
    p.y = problem.y;
    p.counters = static_cast<int*>(problem.workspace);
    p.partials = reinterpret_cast<float*>(static_cast<char*>(problem.workspace) + kW4A16CounterBytes);
    p.m = problem.m, p.n = problem.n, p.k = problem.k;
    p.rows = problem.m < tile_tokens ? problem.m : tile_tokens;
    p.steps = (problem.k + kStep - 1) / kStep;
    p.token_tiles = (problem.m + tile_tokens - 1) / tile_tokens;
    p.tiles = (problem.n + tile_rows - 1) / tile_rows * p.token_tiles;
    p.slices = 1;
    p.halves = problem.output != W4A16Output::kRows;
    p.apart = p.halves ? problem.n / 2 : kRowBlock / 2;
    p.gated = problem.output == W4A16Output::kGated;
    p.features = p.gated ? problem.n / 2 : problem.n;
    return p;
}

// Divide `total` steps among blocks or units among row tiles.
inline void divide(Params& p, int total, int parts) { p.share = total / parts, p.longer = total % parts; }

// x in boxes of `rows` tokens x 64 columns, 128-byte swizzle, zeros outside.
inline const char* describe_tokens(const W4A16Problem& problem, int rows, CUtensorMap* map) {
    const EncodeTiled encode = encode_tiled();
    if (encode == nullptr) return "w4a16: the driver has no cuTensorMapEncodeTiled";
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(problem.k), static_cast<cuuint64_t>(problem.m)};
    const cuuint64_t strides[1] = {2 * static_cast<cuuint64_t>(problem.k)};
    const cuuint32_t box[2] = {kStep / 2, static_cast<cuuint32_t>(rows)}, element_strides[2] = {1, 1};
    const CUresult result =
        encode(map, problem.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
               const_cast<void*>(problem.x), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : "w4a16: the activations cannot be described to the copy engine";
}

// With device.overlap the kernel's prologue and first weights run under the tail of the stream's previous kernel.
template <typename P>
const char* launch(Launch how, P p, const CUtensorMap& token_map, const W4A16Device& device, cudaStream_t stream) {
    how.overlap = device.overlap, how.stream = stream;
    if (const char* error = allow_shared(how.kernel, how.shared_bytes)) return error;
    void* arguments[] = {&p, const_cast<CUtensorMap*>(&token_map)};
    return vllm_sparse::launch(how, arguments);
}

// For kernels whose token tiles are boxes of p.rows, where the copy engine fetches them.
inline const char* launch(const Launch& how, const Params& p, const W4A16Problem& problem, const W4A16Device& device,
                          cudaStream_t stream) {
    CUtensorMap token_map{};
    if (device.capability >= 90) {
        const char* error = describe_tokens(problem, p.rows, &token_map);
        if (error != nullptr) return error;
    }
    return launch(how, p, token_map, device, stream);
}

// Family::run<T, kGroups> for the problem's type and group size.
template <typename Family, typename T>
const char* dispatch(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    switch (problem.group_size) {
        case -1:
            return Family::template run<T, 0>(problem, device, stream);
        case 128:
            return Family::template run<T, 1>(problem, device, stream);
        case 64:
            return Family::template run<T, 2>(problem, device, stream);
        case 32:
            return Family::template run<T, 4>(problem, device, stream);
        default:
            return "w4a16: group size must be 32, 64, 128 or -1";
    }
}

template <typename Family>
const char* dispatch(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    return problem.bf16 ? dispatch<Family, __nv_bfloat16>(problem, device, stream)
                        : dispatch<Family, __half>(problem, device, stream);
}

// The four 8 x 8 tiles of tokens that one mma.sp takes.
__device__ __forceinline__ void load_tokens(uint32_t (&b)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address)
                 : "memory");
}

}  // namespace vllm_sparse::w4a16
