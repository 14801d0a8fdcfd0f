// The 2:4 kernel for fp8, int8, bf16 and fp16: one skeleton from one token to thousands.
//
// The weight is the sparse operand (64 features per warpgroup), tokens are the other one, so the accumulators hold
// out^T. Two warps feed a ring of stages through the copy engine, one the weight and one the tokens; each consumer
// warpgroup multiplies 64 features by all tokens of the tile. Blocks are persistent: cluster c does tiles c, c +
// clusters, ... A cluster is CLUSTER blocks with neighbouring features that share the loads of the tokens, or SPLIT
// blocks that share a tile's columns. Where the tiles of the last round would leave clusters without work, neighbouring
// ones can share the columns of those. Sums are added in an order of their own: results depend on the configuration,
// never on timing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "hopper_linear.h"
#include "hopper_ptx.cuh"
#include "sparse_wgmma.cuh"

namespace vllm_sparse::hopper {

struct KernelArguments {
    const uint8_t* weight;
    const float* weight_scale;
    const float* x_scale;
    const int* x_zero;
    const int* weight_sum;
    const void* bias;
    void* out;
    int m, n;
    int x_scale_stride;
    int x_rows;     // tokens that one block of a cluster loads per tile
    bool x_planes;  // the map of x has planes of one brick's columns: one copy fetches a stage
    bool half_out;
    bool stream_weight;  // each weight byte is read once: let L2 drop it first
    int column_tiles;    // stages along k
    int token_tiles;
    int feature_tiles;  // of 64
    int tiles;          // of the whole cluster
    int rounds;         // of whole tiles
    int shared_tiles;   // the tiles that are left, if two clusters share each one's columns; else 0
    bool overlap;       // the next kernel may start now
    void* scratch;      // see SharedSums
    uint64_t key;       // of this launch
};

// The fewest equal parts of `count` of which each has at most `most`.
constexpr int fewest_parts(int count, int most) {
    int parts = (count + most - 1) / most;
    while (count % parts != 0) ++parts;
    return parts;
}

template <typename Element_, int TOKENS_, int WARPGROUPS_, int BRICKS_, int STAGES_, int CLUSTER_, int SPLIT_>
struct Tile {
    using Element = Element_;
    using Sum = typename Element::Sum;
    static constexpr bool SCALED = Element::BYTES == 1;
    static constexpr int TOKENS = TOKENS_;          // tokens of a tile
    static constexpr int WARPGROUPS = WARPGROUPS_;  // consumers, 64 features each
    static constexpr int BRICKS = BRICKS_;          // bricks per stage and warpgroup
    static constexpr int STAGES = STAGES_;
    static constexpr int CLUSTER = CLUSTER_;  // blocks with neighbouring features that share the tokens' loads
    static constexpr int SPLIT = SPLIT_;      // blocks that share a tile's columns
    static constexpr bool SHARES = CLUSTER > 1 && TOKENS >= 128;  // the tiles of the last round can be shared
    static constexpr int BLOCKS_PER_CLUSTER = CLUSTER > 1 ? CLUSTER : SPLIT;

    static constexpr int THREADS = 128 * WARPGROUPS + 64;
    // Arrivals that free a stage: every consumer thread's, and one per warp of the other blocks that share the tokens.
    static constexpr int RELEASES = 4 * WARPGROUPS * (32 + CLUSTER - 1);
    static constexpr int X_BYTES = TOKENS * kBrickRowBytes * BRICKS;
    static constexpr int BRICK_BYTES = brick_bytes(Element::BYTES);
    static constexpr int W_SLICE = BRICK_BYTES * BRICKS;
    static constexpr int STAGE_BYTES = (X_BYTES + W_SLICE * WARPGROUPS + 1023) / 1024 * 1024;  // the swizzle's period
    static constexpr int ACCUMULATORS = TOKENS / 2;                                            // per thread
    static constexpr int VECTORS = TOKENS / 8;                                                 // the same as float4
    static constexpr int OWNERS =
        SPLIT < VECTORS ? SPLIT : VECTORS;  // blocks of a split tile that write out a part of it
    static constexpr int OUT_TOKENS = TOKENS / OWNERS;
    static constexpr int PART_BYTES = (VECTORS / OWNERS) * WARPGROUPS * 128 * 16;  // one block's sums for one owner
    static constexpr int EXCHANGE_BYTES = (SPLIT - 1) * PART_BYTES;
    // SHARES: stages that another cluster's sums come in, and what of them a warpgroup has in each.
    static constexpr int SUM_STAGES = fewest_parts(VECTORS, STAGE_BYTES / (WARPGROUPS * 128 * 16));
    static constexpr int SUM_VECTORS = VECTORS / SUM_STAGES;
    static constexpr int SUM_BYTES = SUM_VECTORS * 128 * 16;
    // Large tiles leave through the copy engine, as ordinary stores would block the next tile's loads behind them, and
    // through the memory of the stage that was read last. Small ones leave by ordinary stores (per warp 16 features,
    // padded off the banks) from memory of their own, which is sooner there.
    static constexpr bool STORES_TILES = TOKENS * WARPGROUPS >= 256 && SPLIT == 1;
    // At most 32 tokens at once; at most 16 where those divide the tile and 32 do not.
    static constexpr int STAGED_TOKENS = OUT_TOKENS / fewest_parts(OUT_TOKENS / 8, OUT_TOKENS % 32 == 16 ? 2 : 4);
    static constexpr int OUT_PITCH = STORES_TILES ? 128 : 48;
    static constexpr int OUT_BYTES = STAGED_TOKENS * OUT_PITCH;
    static constexpr int OUT_BUFFERS = STORES_TILES ? STAGE_BYTES / WARPGROUPS / OUT_BYTES : 4;  // or one per warp
    static constexpr int STAGING_BYTES = STORES_TILES ? 0 : WARPGROUPS * OUT_BUFFERS * OUT_BYTES;
    static constexpr int SCALE_BYTES = (SCALED ? OUT_TOKENS * 4 + 64 * 4 : 0) + 64 * 2;
    static constexpr int SHARED_BYTES =
        1024 + STAGES * STAGE_BYTES + EXCHANGE_BYTES + STAGING_BYTES + WARPGROUPS * SCALE_BYTES + (2 * STAGES + 2) * 8;

    // Two blocks fit on a multiprocessor: the next kernel's block can fill its stages while this one's still works.
    static constexpr int BLOCKS = 2 * (SHARED_BYTES + 1024) <= 233472 ? 2 : 1;

    static_assert(TOKENS / CLUSTER >= 8, "a block loads whole groups of eight tokens");
    static_assert(BRICKS == 1 || CLUSTER == 1, "one copy of several bricks would not lie where a shared stage has it");
    static_assert(SPLIT == 1 || CLUSTER == 1, "columns are shared in a cluster, or between clusters");
    static_assert(SHARED_BYTES <= 232448, "more shared memory than a block can have");
};

// A thread's positions of one brick, two instructions' worth: a word for each, or one word of which half of the threads
// serve the first and the others the second.
template <typename Element>
struct Positions {
    static constexpr int WORDS = 2 / Element::BYTES;
    uint32_t words[WORDS];

    __device__ void load(uint32_t address, int thread) { ptx::load_shared(address + thread * 4 * WORDS, words); }
    template <int STEP, typename Sums>
    __device__ void multiply(Sums& d, uint64_t a, uint64_t b) const {
        if constexpr (Element::BYTES == 1) {
            wgmma::multiply<0>(Element(), d, a, b, words[STEP]);
        } else {
            wgmma::multiply<STEP>(Element(), d, a, b, words[0]);
        }
    }
};

// Position in the ring of stages, and the parity that its barrier is waited for with.
template <int STAGES>
struct Ring {
    int stage = 0, parity;
    __device__ explicit Ring(int first_parity) : parity(first_parity) {}
    __device__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

struct ToBFloat16 {
    static __device__ uint32_t pack(float a, float b) {
        const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&v);
    }
    static __device__ float unpack(uint16_t v) { return __bfloat162float(__ushort_as_bfloat16(v)); }
};

struct ToFloat16 {
    static __device__ uint32_t pack(float a, float b) {
        const __half2 v = __floats2half2_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&v);
    }
    static __device__ float unpack(uint16_t v) { return __half2float(__ushort_as_half(v)); }
};

// What one warpgroup's epilogue needs, fetched in the background while it multiplies.
template <typename T>
struct Scales {
    float tokens[T::OUT_TOKENS];
    float features[64];

    __device__ void fetch(const KernelArguments& args, int feature_begin, int token_begin, int thread) {
#pragma unroll
        for (int t = thread; t < T::OUT_TOKENS; t += 128) {
            const int token = min(token_begin + t, args.m - 1);
            ptx::copy_async_4(ptx::shared_address(tokens + t), args.x_scale + token * args.x_scale_stride);
        }
        if (thread < 64) {
            ptx::copy_async_4(ptx::shared_address(features + thread), args.weight_scale + feature_begin + thread);
        }
    }
};

struct NoScales {
    __device__ void fetch(const KernelArguments&, int, int, int) {}
};

template <typename T>
struct Epilogue : std::conditional_t<T::SCALED, Scales<T>, NoScales> {
    uint16_t bias[64];

    __device__ void fetch_all(const KernelArguments& args, int feature_begin, int token_begin, int thread) {
        this->fetch(args, feature_begin, token_begin, thread);
        if (thread >= 64 && thread < 96) {
            const int i = 2 * (thread - 64);
            if (args.bias == nullptr) {
                *reinterpret_cast<uint32_t*>(bias + i) = 0;
            } else if (feature_begin + i < args.n) {
                ptx::copy_async_4(ptx::shared_address(bias + i),
                                  static_cast<const uint16_t*>(args.bias) + feature_begin + i);
            }
        }
    }
};

// One thread's way from accumulators to output values: its two features (8 apart) of a warp's 16.
template <typename T, typename Out>
struct Converter {
    const float* token_scales = nullptr;
    float scale_low = 1.f, scale_high = 1.f, bias_low, bias_high;

    __device__ Converter(const Epilogue<T>& epilogue, int warp, int lane) {
        const int row = warp * 16 + lane / 4;
        bias_low = Out::unpack(epilogue.bias[row]), bias_high = Out::unpack(epilogue.bias[row + 8]);
        if constexpr (T::SCALED) {
            token_scales = epilogue.tokens + 2 * (lane % 4);
            scale_low = epilogue.features[row], scale_high = epilogue.features[row + 8];
        }
    }
    // Writes eight tokens from `token` on, each as two runs of 8 features; lane i of 0..15 has the address of one run.
    __device__ void store(uint32_t address, int token, const typename T::Sum (&d)[T::ACCUMULATORS]) const {
        const typename T::Sum* v = d + token / 2;
        if constexpr (T::SCALED) {
            const float2 s = *reinterpret_cast<const float2*>(token_scales + token);
            ptx::store_matrix_transposed(
                address,
                Out::pack(fmaf(float(v[0]) * scale_low, s.x, bias_low), fmaf(float(v[1]) * scale_low, s.y, bias_low)),
                Out::pack(fmaf(float(v[2]) * scale_high, s.x, bias_high),
                          fmaf(float(v[3]) * scale_high, s.y, bias_high)));
        } else {
            ptx::store_matrix_transposed(address, Out::pack(v[0] + bias_low, v[1] + bias_low),
                                         Out::pack(v[2] + bias_high, v[3] + bias_high));
        }
    }
};

// The sum of (x - zero) * w is that of x * w less zero times the sum of w, exactly. `feature` is this thread's first.
template <typename T>
__device__ void subtract_zero_points(const KernelArguments& args, int feature, int token_begin, int lane,
                                     int (&d)[T::ACCUMULATORS]) {
    const int low = args.weight_sum[min(feature, args.n - 1)], high = args.weight_sum[min(feature + 8, args.n - 1)];
#pragma unroll
    for (int t = 0; t < T::OUT_TOKENS; t += 4) {
        const int token = token_begin + t / 8 * 8 + 2 * (lane % 4) + t % 8 / 4;
        const int zero = args.x_zero[min(token, args.m - 1) * args.x_scale_stride];
        d[t / 8 * 4 + t % 8 / 4] -= zero * low;
        d[t / 8 * 4 + t % 8 / 4 + 2] -= zero * high;
    }
}

// One warpgroup's 64 features x OUT_TOKENS to global memory, each warp's 16 features by itself.
template <typename T, typename Out>
__device__ void write_out(const KernelArguments& args, int feature_begin, int token_begin, int thread, uint8_t* staging,
                          const Converter<T, Out>& converter, const typename T::Sum (&d)[T::ACCUMULATORS]) {
    const int warp = thread / 32, lane = thread % 32;
    staging += warp * T::OUT_BYTES;
    const uint32_t store_address = ptx::shared_address(staging) + (lane % 8) * T::OUT_PITCH + (lane / 8 % 2) * 16;
    const uint8_t* const load_address = staging + (lane / 2) * T::OUT_PITCH + (lane % 2) * 16;
    const int token = token_begin + lane / 2, feature = feature_begin + warp * 16 + (lane % 2) * 8;
    uint16_t* const out = static_cast<uint16_t*>(args.out) + int64_t(token) * args.n + feature;
    const int tokens_left = feature < args.n ? args.m - token : 0;
#pragma unroll
    for (int chunk = 0; chunk < T::OUT_TOKENS; chunk += T::STAGED_TOKENS) {
#pragma unroll
        for (int block = 0; block < T::STAGED_TOKENS; block += 8) {
            converter.store(store_address + block * T::OUT_PITCH, chunk + block, d);
        }
        __syncwarp();
#pragma unroll
        for (int block = 0; block < T::STAGED_TOKENS; block += 16) {
            if (chunk + block < tokens_left && lane / 2 + block < T::STAGED_TOKENS) {
                *reinterpret_cast<uint4*>(out + int64_t(chunk + block) * args.n) =
                    *reinterpret_cast<const uint4*>(load_address + block * T::OUT_PITCH);
            }
        }
        __syncwarp();
    }
}

// The same through the copy engine, whose swizzle keeps the transposing writes off each other's banks.
template <typename T, typename Out>
__device__ void store_out(const CUtensorMap* out_map, int feature_begin, int token_begin, int warpgroup, int thread,
                          uint8_t* staging, const Converter<T, Out>& converter,
                          const typename T::Sum (&d)[T::ACCUMULATORS]) {
    const int warp = thread / 32, lane = thread % 32;
    const uint32_t base = ptx::shared_address(staging);
    const uint32_t store_address = base + (lane % 8) * T::OUT_PITCH + (((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16);
#pragma unroll
    for (int chunk = 0; chunk < T::OUT_TOKENS; chunk += T::STAGED_TOKENS) {
        const uint32_t buffer = chunk / T::STAGED_TOKENS % T::OUT_BUFFERS * T::OUT_BYTES;
#pragma unroll
        for (int block = 0; block < T::STAGED_TOKENS; block += 8) {
            converter.store(store_address + buffer + block * T::OUT_PITCH, chunk + block, d);
        }
        ptx::copy_engine_fence();
        ptx::sync_warpgroup(1 + warpgroup);
        if (thread == 0) {
            ptx::store_tile(out_map, feature_begin, token_begin + chunk, base + buffer);
            ptx::store_wait_read<T::OUT_BUFFERS - 2>();  // the buffer after the next one is free
        }
    }
}

// Adds up a tile that SPLIT blocks of a cluster computed, each over its own columns. Every owner gets the other blocks'
// sums of its tokens by remote stores and adds them in the order of the columns; its part of the tile ends up at the
// front of the accumulators.
template <typename T>
struct Exchange {
    using Sum = typename T::Sum;
    struct alignas(16) Four {
        Sum x, y, z, w;
    };

    Four* buffer;      // [SPLIT - 1 senders][VECTORS / OWNERS][threads]
    uint32_t arrived;  // counts the bytes of one tile
    uint32_t drained;  // every other owner has read what this block sent it
    int split_rank;
    int parity = 0;
    bool sent = false;

    static constexpr int PART = T::VECTORS / T::OWNERS;
    static constexpr int THREADS = 128 * T::WARPGROUPS;

    __device__ void reduce(int thread, Sum (&d)[T::ACCUMULATORS]) {
        if (thread == 0 && split_rank < T::OWNERS) ptx::barrier_arrive_expect(arrived, T::EXCHANGE_BYTES);
        wait_until_drained();
        sent = true;
#pragma unroll
        for (int owner = 0; owner < T::OWNERS; ++owner) {
            if (owner != split_rank) {
                const int sender = split_rank < owner ? split_rank : split_rank - 1;
                const uint32_t to = ptx::shared_address(buffer + sender * PART * THREADS + thread);
#pragma unroll
                for (int i = 0; i < PART; ++i) {
                    const Sum* v = d + (owner * PART + i) * 4;
                    ptx::store_remote(to + i * THREADS * 16, v[0], v[1], v[2], v[3], arrived, owner);
                }
            }
        }
        if (split_rank < T::OWNERS) {
#pragma unroll
            for (int owner = 1; owner < T::OWNERS; ++owner) {
                if (owner == split_rank) {
#pragma unroll
                    for (int i = 0; i < 4 * PART; ++i) d[i] = d[owner * 4 * PART + i];
                }
            }
            ptx::barrier_wait(arrived, parity);
#pragma unroll
            for (int i = 0; i < PART; ++i) {
                const Four own = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
                Four sum = {0, 0, 0, 0};
#pragma unroll
                for (int split = 0; split < T::SPLIT; ++split) {
                    const int sender = split < split_rank ? split : split - 1;
                    const Four part = split == split_rank ? own : buffer[(sender * PART + i) * THREADS + thread];
                    sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
                }
                d[4 * i] = sum.x, d[4 * i + 1] = sum.y, d[4 * i + 2] = sum.z, d[4 * i + 3] = sum.w;
            }
            __syncwarp();
            const int lane = thread % 32;
            if (lane < T::SPLIT && lane != split_rank) ptx::barrier_arrive_remote(drained, lane);
        }
        parity ^= 1;
    }
    __device__ void wait_until_drained() const {
        if (sent && drains(split_rank) > 0) ptx::barrier_wait(drained, parity ^ 1);
    }
    // Arrivals on `drained` per tile: each warp of every other owner.
    __device__ static int drains(int split_rank) {
        return 4 * T::WARPGROUPS * (split_rank < T::OWNERS ? T::OWNERS - 1 : T::OWNERS);
    }
};

// A cluster's tiles: `rounds` whole ones, and then perhaps half of one of the tiles that are left. The first of the two
// clusters that share a tile gives its sums away; the second one takes them and finishes the tile.
template <typename T>
struct Schedule {
    struct Piece {
        int tile, first, last;  // columns; the tile is -1 when there is no more
    };

    const KernelArguments& args;
    int worker, workers, split_rank;

    __device__ Piece piece(int i) const {
        const int columns = args.column_tiles;
        if (!T::SHARES || i < args.rounds) {
            const int tile = worker + i * workers;
            return {tile < args.tiles ? tile : -1, columns * split_rank / T::SPLIT,
                    columns * (split_rank + 1) / T::SPLIT};
        }
        if (i > args.rounds || worker >= 2 * args.shared_tiles) return {-1, 0, 0};
        // The first one has fewer columns, as its sums need time to arrive (docs/decisions/0066).
        constexpr int kLead = 4;
        const int tile = args.rounds * workers + worker / 2, middle = columns / 2 - min(kLead, columns / 4);
        return worker % 2 == 0 ? Piece{tile, 0, middle} : Piece{tile, middle, columns};
    }
    __device__ bool gives(const Piece& p) const { return T::SHARES && p.last < args.column_tiles; }
    __device__ bool takes(const Piece& p) const { return T::SHARES && p.first > 0; }
};

// The sums that a cluster gives to another one, through global memory: it writes them, and then a word that says so.
// The other one fetches them into stages behind those of its own columns. It alone waits, for blocks that come before
// it in the grid, so that a launch ends whatever else runs beside it. The word is the launch's key, which no memory
// holds by chance or from another launch, so that nothing has to be initialised; who has read it clears it for the next
// replay of a graph.
template <typename T>
struct SharedSums {
    using Sum = typename T::Sum;
    struct alignas(16) Four {
        Sum x, y, z, w;
    };
    // [pairs of blocks][warpgroups][VECTORS][128 threads] sums, then [pairs][warpgroups] keys.
    Four* sums;
    uint64_t* keys;

    __device__ SharedSums(const KernelArguments& args, int pair) {
        constexpr int kBlock = T::WARPGROUPS * T::VECTORS * 128;
        const int64_t pairs = args.shared_tiles * T::CLUSTER;
        Four* const all = static_cast<Four*>(args.scratch);
        sums = all + int64_t(pair) * kBlock;
        keys = reinterpret_cast<uint64_t*>(all + pairs * kBlock) + pair * T::WARPGROUPS;
    }
    __device__ void give(uint64_t key, int warpgroup, int thread, const Sum (&d)[T::ACCUMULATORS]) {
        Four* const to = sums + warpgroup * T::VECTORS * 128 + thread;
#pragma unroll
        for (int i = 0; i < T::VECTORS; ++i) to[i * 128] = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
        ptx::sync_warpgroup(1 + warpgroup);
        if (thread == 0) ptx::store_release(keys + warpgroup, key);
    }
    // For the copying thread: returns when the sums can be fetched.
    __device__ void wait(uint64_t key) {
        for (int g = 0; g < T::WARPGROUPS; ++g) {
            while (ptx::load_acquire(keys + g) != key) {
            }
            keys[g] = 0;
        }
        ptx::copy_engine_fence_global();
    }
    // Fetches a warpgroup's part of the `i`-th stage of them, SUM_BYTES.
    __device__ void fetch(uint32_t stage, int warpgroup, int i, uint32_t barrier, uint64_t policy) const {
        ptx::copy_bulk(stage + warpgroup * T::SUM_BYTES, sums + (warpgroup * T::VECTORS + i * T::SUM_VECTORS) * 128,
                       T::SUM_BYTES, barrier, policy);
    }
    // Adds this thread's part of the `i`-th stage.
    __device__ static void add(const uint8_t* stage, int warpgroup, int thread, int i, Sum (&d)[T::ACCUMULATORS]) {
        const Four* const from = reinterpret_cast<const Four*>(stage + warpgroup * T::SUM_BYTES) + thread;
#pragma unroll
        for (int v = 0; v < T::SUM_VECTORS; ++v) {
            const Four other = from[v * 128];
            Sum* const own = d + (i * T::SUM_VECTORS + v) * 4;
            own[0] += other.x, own[1] += other.y, own[2] += other.z, own[3] += other.w;
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(T::THREADS, T::BLOCKS)
    linear_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap out_map,
                  const __grid_constant__ KernelArguments args) {
    extern __shared__ uint8_t shared_raw[];
    uint8_t* const stages =
        reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared_raw) + 1023) & ~uintptr_t(1023));
    uint8_t* const exchange_buffer = stages + T::STAGES * T::STAGE_BYTES;
    uint8_t* const staging = exchange_buffer + T::EXCHANGE_BYTES;  // 1024-byte aligned
    Epilogue<T>* const epilogues = reinterpret_cast<Epilogue<T>*>(staging + T::STAGING_BYTES);
    const uint32_t stage_base = ptx::shared_address(stages);
    const uint32_t full = ptx::shared_address(epilogues + T::WARPGROUPS), empty = full + T::STAGES * 8;
    const uint32_t exchange_barriers = empty + T::STAGES * 8;

    const int block_rank = T::BLOCKS_PER_CLUSTER == 1 ? 0 : int(ptx::cluster_rank());
    const int rank = block_rank % T::CLUSTER;
    const int split_rank = block_rank / T::CLUSTER;
    const int worker = blockIdx.x / T::BLOCKS_PER_CLUSTER;
    const Schedule<T> schedule{args, worker, int(gridDim.x / T::BLOCKS_PER_CLUSTER), split_rank};
    const int pair = worker / 2 * T::CLUSTER + rank;  // the two blocks that share a tile's columns
    const int thread = threadIdx.x % 128;
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
    const auto feature_tile = [&](int tile, int group) {
        return ((tile / args.token_tiles) * T::CLUSTER + rank) * T::WARPGROUPS + group;
    };
    // The last tile of many is moved back to end with the last token: tokens beyond m cost the copy engine more than
    // real ones.
    const auto first_token = [&](int tile) {
        return min(tile % args.token_tiles * T::TOKENS, max(0, args.m - T::TOKENS));
    };
    if (threadIdx.x >= 128 * T::WARPGROUPS + 32) {  // the tokens' warp
        ptx::cluster_arrive();
        ptx::cluster_wait();
        ptx::wait_for_dependencies();
        if (thread == 32) {
            const uint64_t policy = args.stream_weight ? ptx::policy_evict_last() : ptx::policy_evict_normal();
            const int brick_bytes = args.x_rows * T::CLUSTER * kBrickRowBytes;
            const uint32_t block_base = stage_base + rank * args.x_rows * kBrickRowBytes;
            Ring<T::STAGES> ring(1);
            bool takes = false;
            for (int i = 0;; ++i) {
                const auto piece = schedule.piece(i);
                if (piece.tile < 0) break;
                takes = schedule.takes(piece);
                const int row = first_token(piece.tile) + rank * args.x_rows;
                for (int c = piece.first; c < piece.last; ++c, ring.advance()) {
                    const uint32_t barrier = full + ring.stage * 8,
                                   destination = block_base + ring.stage * T::STAGE_BYTES;
                    ptx::barrier_wait(empty + ring.stage * 8, ring.parity);
                    ptx::barrier_arrive_expect(barrier, brick_bytes * T::BRICKS);
                    for (int b = 0; b < T::BRICKS; b += args.x_planes ? T::BRICKS : 1) {
                        const int brick = c * T::BRICKS + b;
                        const int column = args.x_planes ? 0 : brick * kBrickRowBytes,
                                  plane = args.x_planes ? brick : 0;
                        if constexpr (T::CLUSTER == 1) {
                            ptx::copy_tile(destination + b * brick_bytes, &x_map, column, row, plane, barrier, policy);
                        } else {
                            ptx::copy_tile_multicast(destination + b * brick_bytes, &x_map, column, row, plane, barrier,
                                                     (1 << T::CLUSTER) - 1, policy);
                        }
                    }
                }
            }
            for (int i = 0; takes && i < T::SUM_STAGES; ++i, ring.advance()) {
                ptx::barrier_wait(empty + ring.stage * 8, ring.parity);
                ptx::barrier_arrive(full + ring.stage * 8);  // without tokens
            }
            // This block's memory must outlive what the others of the cluster still send to it: their last releases.
            if constexpr (T::CLUSTER > 1) {
                for (int s = 0; s < T::STAGES; ++s, ring.advance())
                    ptx::barrier_wait(empty + ring.stage * 8, ring.parity);
            }
        }
        __syncwarp();
    } else if (threadIdx.x >= 128 * T::WARPGROUPS) {  // the weight's warp
        const uint64_t policy = args.stream_weight ? ptx::policy_evict_first() : ptx::policy_evict_normal();
        Ring<T::STAGES> ring(1);
        int index = 0, column = 0;
        auto piece = schedule.piece(0);
        const uint8_t* source[T::WARPGROUPS];
        const auto begin_piece = [&] {
            column = piece.first;
#pragma unroll
            for (int g = 0; g < T::WARPGROUPS; ++g) {
                // Padding tiles beyond the weight read its last one; nothing of them is stored.
                const int f = min(feature_tile(piece.tile, g), args.feature_tiles - 1);
                source[g] = args.weight + (int64_t(f) * args.column_tiles + column) * T::W_SLICE;
            }
        };
        bool takes = false;
        const auto load = [&] {
            const uint32_t barrier = full + ring.stage * 8;
            ptx::barrier_arrive_expect(barrier, T::W_SLICE * T::WARPGROUPS);
#pragma unroll
            for (int g = 0; g < T::WARPGROUPS; ++g) {
                ptx::copy_bulk(stage_base + ring.stage * T::STAGE_BYTES + T::X_BYTES + g * T::W_SLICE, source[g],
                               T::W_SLICE, barrier, policy);
                source[g] += T::W_SLICE;
            }
            ring.advance();
            if (++column == piece.last) {
                takes = schedule.takes(piece);
                piece = schedule.piece(++index);
                if (piece.tile >= 0) begin_piece();
            }
        };
        const bool leader = thread == 0 && piece.tile >= 0 && piece.first < piece.last;
        if (thread == 0) {
            for (int s = 0; s < T::STAGES; ++s) {
                ptx::barrier_init(full + s * 8, 2);
                ptx::barrier_init(empty + s * 8, T::RELEASES);
            }
            if constexpr (T::EXCHANGE_BYTES > 0) {
                ptx::barrier_init(exchange_barriers, 1);
                ptx::barrier_init(exchange_barriers + 8, max(1, Exchange<T>::drains(split_rank)));
            }
            ptx::barrier_init_fence();
        }
        __syncwarp();
        ptx::cluster_arrive();
        // The first loads of the weight depend on no other kernel. Asking for them takes as long as the cluster's
        // barrier and is done meanwhile.
        if (leader) {
            begin_piece();
            for (int s = 0; s < T::STAGES && piece.tile >= 0; ++s) load();
            ptx::prefetch_map(&x_map);
        }
        __syncwarp();
        ptx::cluster_wait();
        if (args.overlap) ptx::launch_dependents();
        if (leader) {
            while (piece.tile >= 0) {
                ptx::barrier_wait(empty + ring.stage * 8, ring.parity);
                load();
            }
            if (takes) {
                SharedSums<T> shared(args, pair);
                shared.wait(args.key);
                for (int i = 0; i < T::SUM_STAGES; ++i, ring.advance()) {
                    const uint32_t barrier = full + ring.stage * 8, stage = stage_base + ring.stage * T::STAGE_BYTES;
                    ptx::barrier_wait(empty + ring.stage * 8, ring.parity);
                    ptx::barrier_arrive_expect(barrier, T::SUM_BYTES * T::WARPGROUPS);
#pragma unroll
                    for (int g = 0; g < T::WARPGROUPS; ++g) shared.fetch(stage, g, i, barrier, policy);
                }
            }
        }
        __syncwarp();
    } else {  // the consumers
        ptx::cluster_arrive();
        ptx::cluster_wait();
        ptx::wait_for_dependencies();
        const int lane = thread % 32;
        const int x_brick = args.x_rows * T::CLUSTER * kBrickRowBytes;
        using Metadata = Positions<typename T::Element>;
        typename T::Sum d[T::ACCUMULATORS];
        Ring<T::STAGES> ring(0);
        Exchange<T> exchange{reinterpret_cast<typename Exchange<T>::Four*>(exchange_buffer), exchange_barriers,
                             exchange_barriers + 8, split_rank};
        // Every lane has read its own metadata and arrives for itself. One lane for all 32 would be no faster, and
        // racecheck does not see what it orders (decision 0065). The other blocks' stages hold tokens for this one's
        // multiplications alone, which are the warp's: one lane tells each.
        const auto release = [&](int stage) {
            ptx::barrier_arrive(empty + stage * 8);
            if constexpr (T::CLUSTER > 1) {
                __syncwarp();
                if (lane > 0 && lane < T::CLUSTER) {
                    ptx::barrier_arrive_remote(empty + stage * 8, (rank + lane) % T::CLUSTER);
                }
            }
        };
        int kept = -1;  // the stage whose memory the previous tile leaves through
        const auto release_kept = [&] {
            if (thread == 0) ptx::store_wait_read<0>();
            ptx::sync_warpgroup(1 + warpgroup);
            release(kept);
            kept = -1;
        };
        const auto finish = [&](const auto& converter, int feature_begin, int token_begin) {
            uint8_t* const own = T::STORES_TILES ? stages + kept * T::STAGE_BYTES : staging;
            uint8_t* const buffers = own + T::OUT_BUFFERS * warpgroup * T::OUT_BYTES;
            if constexpr (T::STORES_TILES) {
                store_out(&out_map, feature_begin, token_begin, warpgroup, thread, buffers, converter, d);
            } else {
                write_out(args, feature_begin, token_begin, thread, buffers, converter, d);
            }
        };
        struct Part {
            int feature_begin, token_begin;
            bool stores;
        };
        const auto find_part = [&](const auto& piece) -> Part {
            const int feature_begin = feature_tile(piece.tile, warpgroup) * 64;
            return {feature_begin, first_token(piece.tile) + split_rank * T::OUT_TOKENS,
                    split_rank < T::OWNERS && feature_begin < args.n && !schedule.gives(piece)};
        };
        for (int index = 0;; ++index) {
            auto piece = schedule.piece(index);
            if (piece.tile < 0) break;
            if (const Part part = find_part(piece); part.stores) {
                ptx::sync_warpgroup(1 + warpgroup);  // the previous tile's scales have been read
                epilogues[warpgroup].fetch_all(args, part.feature_begin, part.token_begin, thread);
            }
#pragma unroll
            for (int i = 0; i < T::ACCUMULATORS; ++i) d[i] = 0;
            int previous = -1;
            // Metadata registers of a batch may not change before it has finished: two sets, one batch in flight.
            Metadata even[T::BRICKS], odd[T::BRICKS];
            const auto step = [&](Metadata(&metadata)[T::BRICKS]) {
                const uint32_t base = stage_base + ring.stage * T::STAGE_BYTES;
                const uint32_t w = base + T::X_BYTES + warpgroup * T::W_SLICE;
                ptx::barrier_wait(full + ring.stage * 8, ring.parity);
#pragma unroll
                for (int b = 0; b < T::BRICKS; ++b) {
                    metadata[b].load(w + b * T::BRICK_BYTES + kBrickValueBytes, thread);
                }
                wgmma::fence();
#pragma unroll
                for (int b = 0; b < T::BRICKS; ++b) {
                    const uint64_t a = wgmma::plain_descriptor(w + b * T::BRICK_BYTES, 128, 256);
                    const uint64_t x = wgmma::swizzled_128_descriptor(base + b * x_brick);
                    metadata[b].template multiply<0>(d, a, x);
                    metadata[b].template multiply<1>(d, a + (2048 >> 4), x + (64 >> 4));
                }
                wgmma::commit();
                wgmma::wait<1>();
                if (previous >= 0) {
                    release(previous);
                } else if (T::STORES_TILES && kept >= 0) {
                    release_kept();
                }
                previous = ring.stage;
                ring.advance();
            };
            int left = piece.last - piece.first;
            for (; left > 1; left -= 2) {
                step(even);
                step(odd);
            }
            if (left > 0) step(even);
            wgmma::wait<0>();
            // Found out again, so that nothing but the sums has registers meanwhile.
            asm volatile("" : "+r"(index));
            piece = schedule.piece(index);
            const Part part = find_part(piece);
            const bool gives = schedule.gives(piece);
            if (schedule.takes(piece)) {
#pragma unroll
                for (int i = 0; i < T::SUM_STAGES; ++i, ring.advance()) {
                    release(previous);
                    previous = ring.stage;
                    ptx::barrier_wait(full + ring.stage * 8, ring.parity);
                    SharedSums<T>::add(stages + ring.stage * T::STAGE_BYTES, warpgroup, thread, i, d);
                }
            }
            if (T::STORES_TILES && !gives) {
                kept = previous;
                ptx::sync_consumers<T::WARPGROUPS>();  // all have read it
            } else if (previous >= 0) {
                release(previous);
            }

            if (gives) {
                SharedSums<T>(args, pair).give(args.key, warpgroup, thread, d);
            } else if constexpr (T::SPLIT > 1) {
                exchange.reduce(warpgroup * 128 + thread, d);
            }
            if (part.stores) {
                ptx::copy_async_wait();
                ptx::sync_warpgroup(1 + warpgroup);
                const int warp = thread / 32;
                if constexpr (std::is_same_v<typename T::Sum, int>) {
                    const int feature = part.feature_begin + warp * 16 + lane / 4;
                    if (args.x_zero != nullptr) subtract_zero_points<T>(args, feature, part.token_begin, lane, d);
                }
                const bool half = T::SCALED ? args.half_out : std::is_same_v<typename T::Element, wgmma::Float16>;
                if (half) {
                    finish(Converter<T, ToFloat16>(epilogues[warpgroup], warp, lane), part.feature_begin,
                           part.token_begin);
                } else {
                    finish(Converter<T, ToBFloat16>(epilogues[warpgroup], warp, lane), part.feature_begin,
                           part.token_begin);
                }
            }
        }
        if (T::STORES_TILES && kept >= 0) release_kept();
        if constexpr (T::EXCHANGE_BYTES > 0) exchange.wait_until_drained();  // as above: the last arrivals from others
    }
}

}  // namespace vllm_sparse::hopper
