// The FP8 2:4 kernel: one skeleton from one token to thousands.
//
// The weight is the sparse operand (64 features per warpgroup), tokens are the other one, so D is out^T. One warp feeds a ring of
// stages through the copy engine; each consumer warpgroup multiplies 64 features by all tokens of the tile. Blocks are persistent.
// Tiles are dealt in two ways: `direct_tiles` whole tiles round robin, and the rest cut into equal runs of stages ("stream-K"), so
// that every multiprocessor reads the same number of bytes whatever n and k are. A tile that is cut is summed by the block that has
// its first columns, in the order of the columns: results do not depend on timing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fp8_linear.h"
#include "hopper_ptx.cuh"
#include "sparse_wgmma.cuh"

namespace vllm_sparse::fp8 {

struct KernelArguments {
    const uint8_t* weight;
    const float* weight_scale;
    const float* x_scale;
    const void* bias;
    void* out;
    float4* partials;
    int m, n;
    int x_scale_stride;
    bool half_out;
    bool stream_weight;   // each weight byte is read once: let L2 drop it first
    int column_tiles;     // stages along k
    int token_tiles;
    int feature_tiles;    // of 64
    int tiles;            // of the whole cluster
    int direct_tiles;
};

template <int TOKENS_, int WARPGROUPS_, int BRICKS_, int STAGES_, int CLUSTER_>
struct Tile {
    static constexpr int TOKENS = TOKENS_;          // tokens of a tile
    static constexpr int WARPGROUPS = WARPGROUPS_;  // consumers, 64 features each
    static constexpr int BRICKS = BRICKS_;          // bricks (128 columns) per stage and warpgroup
    static constexpr int STAGES = STAGES_;
    static constexpr int CLUSTER = CLUSTER_;        // blocks with neighbouring features that share the tokens' loads

    static constexpr int FEATURES = 64 * WARPGROUPS;
    static constexpr int THREADS = 128 * WARPGROUPS + 32;
    static constexpr int X_BRICK = TOKENS * kBrickColumns;
    static constexpr int X_BYTES = X_BRICK * BRICKS;
    static constexpr int W_SLICE = kBrickBytes * BRICKS;
    static constexpr int STAGE_BYTES = X_BYTES + W_SLICE * WARPGROUPS;
    static constexpr int OUT_TOKENS = TOKENS < 32 ? TOKENS : 32;  // tokens staged at a time on their way out
    static constexpr int OUT_PITCH = 144;                         // 64 features of 2 bytes, padded off the banks
    static constexpr int OUT_BYTES = OUT_TOKENS * OUT_PITCH;
    static constexpr int ACCUMULATORS = TOKENS / 2;
    static constexpr int PARTIAL_VECTORS = TOKENS / 8;  // float4 per thread
    static constexpr int PARTIAL_BYTES = FEATURES * TOKENS * 4;
    static constexpr int SHARED_BYTES =
        1024 + STAGES * STAGE_BYTES + WARPGROUPS * (OUT_BYTES + TOKENS * 4) + 2 * STAGES * 8;

    // Two blocks fit on a multiprocessor: the next kernel's block can fill its stages while this one's still works.
    static constexpr int BLOCKS = 2 * (SHARED_BYTES + 1024) <= 233472 ? 2 : 1;

    static_assert(TOKENS / CLUSTER >= 8, "a block loads whole groups of eight tokens");
    static_assert(SHARED_BYTES <= 232448, "more shared memory than a block can have");
};

// The runs of stages of one block, in the order in which it does them. Producer and consumers walk the same list.
struct Runs {
    int tile, first, last;  // this run: columns tiles [first, last) of `tile`

    __device__ Runs(const KernelArguments& args, int worker, int workers)
        : columns_(args.column_tiles), tiles_(args.tiles), direct_(args.direct_tiles), next_direct_(worker), step_(workers) {
        // Later blocks get earlier runs: whoever waits for a part of its tile waits for a block that was started before it.
        share_ = workers - 1 - worker;
        cursor_ = share_begin(share_);
        end_ = share_begin(share_ + 1);
    }

    __device__ bool next() {
        if (cursor_ < end_) {
            tile = direct_ + cursor_ / columns_;
            first = cursor_ % columns_;
            last = min(columns_, first + end_ - cursor_);
            cursor_ += last - first;
            return true;
        }
        if (next_direct_ >= direct_) return false;
        tile = next_direct_;
        first = 0;
        last = columns_;
        next_direct_ += step_;
        return true;
    }

    __device__ int share() const { return share_; }
    __device__ int share_begin(int share) const {
        return static_cast<int>(int64_t(tiles_ - direct_) * columns_ * share / step_);
    }
    // First stage behind the cut tile `tile`, counted like share_begin.
    __device__ int tile_end() const { return (tile - direct_ + 1) * columns_; }

   private:
    int columns_, tiles_, direct_, next_direct_, step_, share_, cursor_, end_;
};

// Partial sums travel through L2 without flags: the workspace holds this bit pattern wherever nothing was written yet, and a sum
// never has it (a NaN is replaced by the canonical one).
__device__ __forceinline__ float sum_or_nan(float v) { return __float_as_uint(v) == 0xFFFFFFFFu ? __uint_as_float(0x7FFFFFFFu) : v; }
__device__ __forceinline__ bool arrived(const float4& v) {
    return __float_as_uint(v.x) != 0xFFFFFFFFu && __float_as_uint(v.y) != 0xFFFFFFFFu && __float_as_uint(v.z) != 0xFFFFFFFFu &&
           __float_as_uint(v.w) != 0xFFFFFFFFu;
}

template <typename T>
__device__ float4* partial_slot(const KernelArguments& args, int share, int rank, int thread) {
    return args.partials + (int64_t(share) * T::CLUSTER + rank) * (T::PARTIAL_BYTES / 16) + thread;
}

template <typename T>
__device__ void send_partial(const KernelArguments& args, int share, int rank, int thread, const float (&d)[T::ACCUMULATORS]) {
    float4* slot = partial_slot<T>(args, share, rank, thread);
#pragma unroll
    for (int i = 0; i < T::PARTIAL_VECTORS; ++i) {
        ptx::store_relaxed(slot + i * 128 * T::WARPGROUPS, make_float4(sum_or_nan(d[4 * i]), sum_or_nan(d[4 * i + 1]),
                                                                       sum_or_nan(d[4 * i + 2]), sum_or_nan(d[4 * i + 3])));
    }
}

template <typename T>
__device__ void add_partial(const KernelArguments& args, int share, int rank, int thread, float (&d)[T::ACCUMULATORS]) {
    // Loads in flight, as registers allow.
    constexpr int BATCH = T::TOKENS == 8 ? 1 : T::TOKENS == 16 || T::WARPGROUPS == 4 ? 2 : 4;
    const float4 empty = make_float4(__uint_as_float(0xFFFFFFFFu), __uint_as_float(0xFFFFFFFFu), __uint_as_float(0xFFFFFFFFu),
                                     __uint_as_float(0xFFFFFFFFu));
    float4* slot = partial_slot<T>(args, share, rank, thread);
#pragma unroll
    for (int i = 0; i < T::PARTIAL_VECTORS; i += BATCH) {
        float4 part[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) part[j] = ptx::load_relaxed(slot + (i + j) * 128 * T::WARPGROUPS);
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            float4* place = slot + (i + j) * 128 * T::WARPGROUPS;
            while (!arrived(part[j])) part[j] = ptx::load_relaxed(place);
            ptx::store_relaxed(place, empty);
            d[4 * (i + j)] += part[j].x;
            d[4 * (i + j) + 1] += part[j].y;
            d[4 * (i + j) + 2] += part[j].z;
            d[4 * (i + j) + 3] += part[j].w;
        }
    }
}

__device__ __forceinline__ uint32_t pack_out(float a, float b, bool half_out) {
    if (half_out) {
        const __half2 v = __floats2half2_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&v);
    }
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
}

__device__ __forceinline__ float load_bias(const KernelArguments& args, int feature) {
    if (args.bias == nullptr || feature >= args.n) return 0.f;
    return args.half_out ? __half2float(static_cast<const __half*>(args.bias)[feature])
                         : __bfloat162float(static_cast<const __nv_bfloat16*>(args.bias)[feature]);
}

// Scales, adds the bias, converts and transposes one warpgroup's 64 features x TOKENS through shared memory.
template <typename T>
__device__ void write_out(const KernelArguments& args, int feature_tile, int token_tile, int warpgroup, int thread, uint8_t* staging,
                          float* token_scales, const float (&d)[T::ACCUMULATORS]) {
    const int warp = thread / 32, lane = thread % 32;
    const int token_begin = token_tile * T::TOKENS;
    for (int t = thread; t < T::TOKENS; t += 128) {
        const int token = token_begin + t;
        token_scales[t] = token < args.m ? args.x_scale[token * args.x_scale_stride] : 0.f;
    }
    const int feature = feature_tile * 64 + warp * 16 + lane / 4;
    const float scale_low = args.weight_scale[feature], scale_high = args.weight_scale[feature + 8];
    const float bias_low = load_bias(args, feature), bias_high = load_bias(args, feature + 8);
    const uint32_t store_address = ptx::shared_address(staging) + (lane % 8) * T::OUT_PITCH + warp * 32 + (lane / 8 % 2) * 16;
    const int out_feature = feature_tile * 64 + (thread % 8) * 8;
    ptx::sync_warpgroup(1 + warpgroup);
#pragma unroll
    for (int chunk = 0; chunk < T::TOKENS / T::OUT_TOKENS; ++chunk) {
#pragma unroll
        for (int block = 0; block < T::OUT_TOKENS / 8; ++block) {
            const int t = chunk * T::OUT_TOKENS + block * 8;
            const float2 s = *reinterpret_cast<const float2*>(token_scales + t + 2 * (lane % 4));
            const float* v = d + t / 2;
            ptx::store_matrix_transposed(
                store_address + block * 8 * T::OUT_PITCH,
                pack_out(fmaf(v[0] * scale_low, s.x, bias_low), fmaf(v[1] * scale_low, s.y, bias_low), args.half_out),
                pack_out(fmaf(v[2] * scale_high, s.x, bias_high), fmaf(v[3] * scale_high, s.y, bias_high), args.half_out));
        }
        ptx::sync_warpgroup(1 + warpgroup);
#pragma unroll
        for (int row = 0; row < T::OUT_TOKENS; row += 16) {
            const int t = row + thread / 8, token = token_begin + chunk * T::OUT_TOKENS + t;
            if (t < T::OUT_TOKENS && token < args.m && out_feature < args.n) {
                const uint4 v = *reinterpret_cast<const uint4*>(staging + t * T::OUT_PITCH + (thread % 8) * 16);
                *reinterpret_cast<uint4*>(static_cast<uint16_t*>(args.out) + int64_t(token) * args.n + out_feature) = v;
            }
        }
        ptx::sync_warpgroup(1 + warpgroup);
    }
}

template <typename T>
__global__ void __launch_bounds__(T::THREADS, T::BLOCKS)
    linear_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ KernelArguments args) {
    extern __shared__ uint8_t shared_raw[];
    uint8_t* const stages = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared_raw) + 1023) & ~uintptr_t(1023));
    uint8_t* const staging = stages + T::STAGES * T::STAGE_BYTES;
    float* const token_scales = reinterpret_cast<float*>(staging + T::WARPGROUPS * T::OUT_BYTES);
    const uint32_t stage_base = ptx::shared_address(stages);
    const uint32_t full = ptx::shared_address(token_scales + T::WARPGROUPS * T::TOKENS), empty = full + T::STAGES * 8;

    const int rank = T::CLUSTER == 1 ? 0 : int(ptx::cluster_rank());
    const int worker = blockIdx.x / T::CLUSTER, workers = gridDim.x / T::CLUSTER;
    const int thread = threadIdx.x % 128;
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
    Runs runs(args, worker, workers);
    // Padding tiles beyond the weight read the last one; nothing of them is stored.
    const auto feature_tile = [&](int tile, int group) {
        return ((tile / args.token_tiles) * T::CLUSTER + rank) * T::WARPGROUPS + group;
    };

    if (warpgroup == T::WARPGROUPS) {
        const bool leader = thread == 0;
        const uint64_t weight_policy = args.stream_weight ? ptx::policy_evict_first() : ptx::policy_evict_normal();
        const uint64_t x_policy = args.stream_weight ? ptx::policy_evict_last() : ptx::policy_evict_normal();
        const auto load_weight = [&](int stage, int tile, int column) {
            const uint32_t barrier = full + stage * 8;
            ptx::barrier_arrive_expect(barrier, T::STAGE_BYTES);
#pragma unroll
            for (int g = 0; g < T::WARPGROUPS; ++g) {
                const int f = min(feature_tile(tile, g), args.feature_tiles - 1);
                const int64_t brick = (int64_t(f) * args.column_tiles + column) * T::BRICKS;
                ptx::copy_bulk(stage_base + stage * T::STAGE_BYTES + T::X_BYTES + g * T::W_SLICE, args.weight + brick * kBrickBytes,
                               T::W_SLICE, barrier, weight_policy);
            }
        };
        const auto load_x = [&](int stage, int tile, int column) {
            constexpr int ROWS = T::TOKENS / T::CLUSTER;
            const int row = (tile % args.token_tiles) * T::TOKENS + rank * ROWS;
#pragma unroll
            for (int b = 0; b < T::BRICKS; ++b) {
                const uint32_t destination = stage_base + stage * T::STAGE_BYTES + b * T::X_BRICK + rank * ROWS * kBrickColumns;
                const int x_column = (column * T::BRICKS + b) * kBrickColumns;
                if constexpr (T::CLUSTER == 1) {
                    ptx::copy_tile(destination, &x_map, x_column, row, full + stage * 8, x_policy);
                } else {
                    ptx::copy_tile_multicast(destination, &x_map, x_column, row, full + stage * 8, (1 << T::CLUSTER) - 1, x_policy);
                }
            }
        };
        // The first loads of the weight depend on no other kernel: they start before anything else happens.
        Runs ahead = runs;
        int started = 0;
        if (leader) {
            ptx::prefetch_map(&x_map);
            for (int s = 0; s < T::STAGES; ++s) {
                ptx::barrier_init(full + s * 8, 1);
                ptx::barrier_init(empty + s * 8, 4 * T::WARPGROUPS * T::CLUSTER);
            }
            ptx::barrier_init_fence();
            while (started < T::STAGES && ahead.next()) {
                for (int c = ahead.first; c < ahead.last && started < T::STAGES; ++c) load_weight(started++, ahead.tile, c);
            }
        }
        __syncwarp();
        if constexpr (T::CLUSTER > 1) {
            ptx::cluster_arrive();
            ptx::cluster_wait();
        } else {
            __syncthreads();
        }
        ptx::launch_dependents();
        ptx::wait_for_dependencies();
        if (leader) {
            int stage = 0, parity = 1, issued = 0;
            while (runs.next()) {
                for (int c = runs.first; c < runs.last; ++c) {
                    if (issued >= started) {
                        ptx::barrier_wait(empty + stage * 8, parity);
                        load_weight(stage, runs.tile, c);
                    }
                    load_x(stage, runs.tile, c);
                    ++issued;
                    if (++stage == T::STAGES) stage = 0, parity ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        if constexpr (T::CLUSTER > 1) {
            ptx::cluster_arrive();
            ptx::cluster_wait();
        } else {
            __syncthreads();
        }
        ptx::wait_for_dependencies();
        const int lane = thread % 32;
        const int partial_thread = warpgroup * 128 + thread;
        float d[T::ACCUMULATORS];
        int stage = 0, parity = 0;
        const auto release = [&](int s) {
            if constexpr (T::CLUSTER == 1) {
                if (lane == 0) ptx::barrier_arrive(empty + s * 8);
            } else {
                if (lane < T::CLUSTER) ptx::barrier_arrive_remote(empty + s * 8, lane);
            }
        };
        while (runs.next()) {
            const int count = runs.last - runs.first;
            int previous = -1;
            // Metadata registers of a batch may not change before it has finished: two sets, one batch in flight.
            uint2 even[T::BRICKS], odd[T::BRICKS];
            const auto step = [&](uint2(&metadata)[T::BRICKS], bool first) {
                const uint32_t base = stage_base + stage * T::STAGE_BYTES;
                const uint32_t w = base + T::X_BYTES + warpgroup * T::W_SLICE;
                ptx::barrier_wait(full + stage * 8, parity);
#pragma unroll
                for (int b = 0; b < T::BRICKS; ++b) {
                    metadata[b] = *reinterpret_cast<const uint2*>(stages + (w - stage_base) + b * kBrickBytes + 4096 + thread * 8);
                }
                wgmma::fence();
#pragma unroll
                for (int b = 0; b < T::BRICKS; ++b) {
                    const uint64_t a = wgmma::plain_descriptor(w + b * kBrickBytes, 128, 256);
                    const uint64_t x = wgmma::swizzled_128_descriptor(base + b * T::X_BRICK);
                    wgmma::multiply(d, a, x, metadata[b].x, !(first && b == 0));
                    wgmma::multiply(d, a + (2048 >> 4), x + (64 >> 4), metadata[b].y, 1);
                }
                wgmma::commit();
                wgmma::wait<1>();
                if (previous >= 0) release(previous);
                previous = stage;
                if (++stage == T::STAGES) stage = 0, parity ^= 1;
            };
            int i = 0;
            for (; i + 1 < count; i += 2) {
                step(even, i == 0);
                step(odd, false);
            }
            if (i < count) step(even, i == 0);
            wgmma::wait<0>();
            release(previous);

            if (runs.first > 0) {
                send_partial<T>(args, runs.share(), rank, partial_thread, d);
                continue;
            }
            if (runs.last < args.column_tiles) {
                for (int s = runs.share() + 1; s < workers && runs.share_begin(s) < runs.tile_end(); ++s) {
                    if (runs.share_begin(s + 1) > runs.share_begin(s)) add_partial<T>(args, s, rank, partial_thread, d);
                }
            }
            const int f = feature_tile(runs.tile, warpgroup);
            if (f < args.feature_tiles) {
                write_out<T>(args, f, runs.tile % args.token_tiles, warpgroup, thread, staging + warpgroup * T::OUT_BYTES,
                             token_scales + warpgroup * T::TOKENS, d);
            }
        }
    }
    // No block of a cluster may leave while another still writes to its memory or barriers.
    if constexpr (T::CLUSTER > 1) {
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
}

}  // namespace vllm_sparse::fp8
