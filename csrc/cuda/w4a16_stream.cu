// W4A16 2:4 sparse linear for few tokens on Hopper: mma.sp with the weights as the sparse operand. A block takes some
// rows and all columns, or half of them beside the other block of a cluster; its warps divide the steps of a stage
// further. The sums of the warps and blocks meet in the (distributed) shared memory of the block that stores them. A
// block has half of a multiprocessor, so that the next kernel's block stands beside it and fills its stages while this
// one works (programmatic dependent launch).
#include "w4a16_common.cuh"

namespace vllm_sparse::w4a16 {
namespace {

constexpr int kWarps = 8;                    // that multiply
constexpr int kThreads = 32 * kWarps + 128;  // a whole warpgroup copies (two warps of it) and gives registers away
constexpr int kMostStages = 16;
constexpr int kSharedBytes = 115712;  // half of a multiprocessor's
constexpr int kAllShared = 232448;    // the most that a block can have
constexpr int kBarrierBytes = 32 * kMostStages + 8;

template <int kGroups_, int kJ_, int kI_, int kWays_, int kRepeat_>
struct Config {
    static constexpr int kGroups = kGroups_;  // scales per row and step; 0: one scale per channel, applied at the end
    static constexpr int kJ = kJ_;            // tiles of 8 tokens
    static constexpr int kI = kI_;            // row blocks of a warp
    static constexpr int kWays = kWays_;      // warps that divide the steps of a stage, with the same rows
    static constexpr int kRepeat = kRepeat_;  // steps of a stage for each of them
    static constexpr int kSteps = kWays * kRepeat;
    static constexpr int kRowGroups = kWarps / kWays;
    static constexpr int kMostBlocks = kRowGroups * kI;
    static constexpr int kBlock = kBlockBytes<kGroups>;
    // Sums of one block only: tiles may be many. They are of two heights then, half a panel and a whole one, and so no
    // tile lies in two panels. The taller ones end later, so that the memory is busy while the others' blocks change.
    static constexpr bool kWhole = kWays == 1;
    static constexpr int kUnit = kWhole ? kPanelBlocks / 2 : 1;
    static_assert(kRepeat <= 2 && (!kWhole || kMostBlocks == kPanelBlocks));
};

struct StreamParams : Params {
    int height;   // row blocks that a step has room for: those of the tallest tile, and a whole number of warps'
    int part;     // row blocks whose sums one block of a cluster adds up
    int copied;   // tokens: with 9 to 16, 16 in one copy, which takes less time than two of what there is
    bool planes;  // one copy fetches the tokens of a stage
    int weight_stages, token_stages;
    int weight_bytes, token_bytes;  // of a stage
    int weights, sums, barriers;    // offsets in shared memory; the tokens are at 0
};

// d = a (16 rows x 32 columns, 2:4) * b (32 columns x 8 tokens) + c
template <typename T, int kSelector>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], const float (&c)[4],
                                    uint32_t positions) {
#define VLLM_SPARSE_MMA(type)                                                                                         \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type                          \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%12, %13, %14, %15}, %16, %17;"       \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "f"(c[0]), \
                   "f"(c[1]), "f"(c[2]), "f"(c[3]), "r"(positions), "n"(kSelector))
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        VLLM_SPARSE_MMA("bf16");
    } else {
        VLLM_SPARSE_MMA("f16");
    }
#undef VLLM_SPARSE_MMA
}

// Where a warp's tokens lie in a stage, for ldmatrix. Rows of 128 swizzled bytes, 64 columns of all tokens after the
// other; 16 bytes of a row are one piece. Tokens beyond the last repeat it: their sums are not stored.
template <typename C>
struct Tokens {
    // With 9 to 16 tokens, 16 rows are copied, and the places differ by constants.
    static constexpr bool kFixed = C::kJ == 2;
    uint32_t first[kFixed ? 1 : 2 * C::kRepeat];

    __device__ __forceinline__ Tokens(int rows, int way) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < (kFixed ? 1 : 2 * C::kRepeat); ++i) {
            const int row =
                (2 * (i / 2 * C::kWays + way) + i % 2) * (kFixed ? 16 : rows) + min(lane % 8, kFixed ? 7 : rows - 1);
            first[i] = row * 128 + ((lane / 8) ^ (row % 8)) * 16;
        }
    }
    __device__ __forceinline__ uint32_t at(uint32_t stage, int repeat, int unit, int j) const {
        if constexpr (kFixed) {
            return ((stage + first[0]) ^ (unit % 2 * 64)) + (2 * repeat * C::kWays + unit / 2) * 2048 + j * 1024;
        } else {
            return (stage + first[2 * repeat + unit / 2]) ^ (unit % 2 * 64);
        }
    }
};

// acc += one step. No branch inside, and unit by unit for all row blocks, so that they hide each other's latencies:
// columns beyond k meet tokens that the copy engine has set to zero.
template <typename T, typename C>
__device__ __forceinline__ void multiply_step(float (&acc)[C::kI][C::kJ][4], const char* weights, uint32_t stage,
                                              const Tokens<C>& tokens, int repeat) {
    const int lane = threadIdx.x % 32;
    constexpr int kGroups = C::kGroups == 0 ? 1 : C::kGroups, kGroupUnits = kUnits / kGroups;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        uint32_t codes[C::kI][kGroupUnits], positions[C::kI][(kGroupUnits + 1) / 2];
        float part[C::kI][C::kJ][4] = {};
#pragma unroll
        for (int i = 0; i < C::kI; ++i) {
            const char* block = weights + i * C::kBlock;
            memcpy(codes[i], __builtin_assume_aligned(block + 16 * lane + sizeof(codes[i]) * group, sizeof(codes[i])),
                   sizeof(codes[i]));
            memcpy(positions[i],
                   __builtin_assume_aligned(block + kCodeBytes + 8 * lane + group * kGroupUnits / 2 * 4,
                                            sizeof(positions[i])),
                   sizeof(positions[i]));
        }
#pragma unroll
        for (int unit = 0; unit < kGroupUnits; ++unit) {
            uint32_t b[C::kJ][4];
#pragma unroll
            for (int j = 0; j < C::kJ; ++j) {
                load_tokens(b[j], tokens.at(stage, repeat, group * kGroupUnits + unit, j));
            }
#pragma unroll
            for (int i = 0; i < C::kI; ++i) {
                uint32_t a[4];
                decode(codes[i][unit], a, T());
#pragma unroll
                for (int j = 0; j < C::kJ; ++j) {
                    float (&d)[4] = C::kGroups == 0 ? acc[i][j] : part[i][j];
                    if ((group * kGroupUnits + unit) % 2 == 0) {
                        mma<T, 0>(d, a, b[j], d, positions[i][unit / 2]);
                    } else {
                        mma<T, 1>(d, a, b[j], d, positions[i][unit / 2]);
                    }
                }
            }
        }
        if constexpr (C::kGroups > 0) {
#pragma unroll
            for (int i = 0; i < C::kI; ++i) {
                const uint32_t* scales =
                    reinterpret_cast<const uint32_t*>(weights + i * C::kBlock + kCodeBytes + kPositionBytes);
                const float2 scale = unpack(scales[lane / 4 * C::kGroups + group], T());
#pragma unroll
                for (int j = 0; j < C::kJ; ++j) {
                    acc[i][j][0] += scale.x * part[i][j][0], acc[i][j][1] += scale.x * part[i][j][1];
                    acc[i][j][2] += scale.y * part[i][j][2], acc[i][j][3] += scale.y * part[i][j][3];
                }
            }
        }
    }
}

// A block's stages of columns ("chunks") in every tile.
struct Share {
    int begin, end;
    __device__ __forceinline__ Share(const StreamParams& p, int steps, int rank) {
        const int chunks = (p.steps + steps - 1) / steps;
        begin = rank * chunks / p.slices, end = (rank + 1) * chunks / p.slices;
    }
};

template <typename C>
__device__ __forceinline__ Place place_of(const StreamParams& p, int tile) {
    const int all = p.n / kRowBlock, block = min(all, share_begin(tile, p) * C::kUnit);
    return {block, min(all, share_begin(tile + 1, p) * C::kUnit) - block, 0};
}

// A place in a ring of stages, and the barriers that say that a stage is full or empty.
struct Ring {
    uint32_t full;
    int stages, stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ Ring(uint32_t full, int stages) : full(full), stages(stages) {}
    __device__ __forceinline__ uint32_t is_full() const { return full + 8 * stage; }
    __device__ __forceinline__ uint32_t is_empty() const { return is_full() + 8 * kMostStages; }
    __device__ __forceinline__ void next() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// One warp. Lane w < kSteps copies the weights of step w of a stage, lane kSteps + w those of them that lie in the next
// panel. They do not depend on the previous kernel: the first ones are asked for before `sync`.
template <typename C, typename Sync>
__device__ __forceinline__ void copy_weights(const StreamParams& p, uint32_t shared, Ring ring, const Share& share,
                                             Sync sync) {
    const int lane = threadIdx.x % 32, way = lane % C::kSteps;
    const bool lower = lane >= C::kSteps, copies = lane < (C::kWhole ? 1 : 2) * C::kSteps;
    const uint64_t policy = ptx::policy_evict_first();
    int unused = p.weight_stages;
    for (int tile = blockIdx.x / p.slices; tile < p.tiles; tile += gridDim.x / p.slices) {
        const Place place = place_of<C>(p, tile);
        const int upper = min(place.blocks, kPanelBlocks - place.block % kPanelBlocks), skip = lower ? upper : 0;
        Walk<C::kGroups> walk(p, place.block + skip, lower ? place.blocks - upper : upper,
                              share.begin * C::kSteps + way);
        const uint32_t to = shared + p.weights + (way * p.height + skip) * C::kBlock;
        const bool mine = copies && walk.bytes > 0;
        for (int chunk = share.begin; chunk < share.end; ++chunk, walk.weight += C::kSteps * walk.stride) {
            if (unused > 0) {
                --unused;
            } else {
                if (unused == 0) sync(), --unused;
                ptx::barrier_wait(ring.is_empty(), ring.parity ^ 1);
            }
            const int steps = min(C::kSteps, p.steps - chunk * C::kSteps);
            if (lane == 0) ptx::barrier_arrive_expect(ring.is_full(), steps * place.blocks * C::kBlock);
            __syncwarp();
            if (mine && way < steps) {
                ptx::copy_bulk(to + ring.stage * p.weight_bytes, walk.weight, walk.bytes, ring.is_full(), policy);
            }
            __syncwarp();
            ring.next();
        }
    }
    if (unused >= 0) sync();
}

// One thread.
template <typename C>
__device__ __forceinline__ void copy_tokens(const StreamParams& p, const CUtensorMap* token_map, uint32_t shared,
                                            Ring ring, const Share& share) {
    const uint64_t policy = ptx::policy_evict_last();
    for (int tile = blockIdx.x / p.slices; tile < p.tiles; tile += gridDim.x / p.slices) {
        for (int chunk = share.begin; chunk < share.end; ++chunk, ring.next()) {
            const uint32_t to = shared + ring.stage * p.token_bytes, full = ring.is_full();
            ptx::barrier_wait(ring.is_empty(), ring.parity ^ 1);
            ptx::barrier_arrive_expect(full, 256 * C::kSteps * p.copied);
            if (p.planes) {
                ptx::copy_tile(to, token_map, 0, 0, 2 * C::kSteps * chunk, full, policy);
            } else {
                for (int plane = 0; plane < 2 * C::kSteps; ++plane) {
                    ptx::copy_tile(to + plane * 128 * p.copied, token_map, (2 * C::kSteps * chunk + plane) * 64, 0, 0,
                                   full, policy);
                }
            }
        }
    }
}

// Add up the warps' and blocks' sums of what this block stores, always in the order of the columns, and store it.
template <typename T, typename C, typename Order>
__device__ __forceinline__ void store_sums(const StreamParams& p, const float4* sums, uint32_t arrived,
                                           const Place& place, int rank) {
    const int own = min(p.part, place.blocks - rank * p.part);
    for (int piece = threadIdx.x / 32; piece < own * C::kJ; piece += kWarps) {
        const int row = (place.block + rank * p.part + piece / C::kJ) * kRowBlock;
        const float2 scale = load_channel_scale<Order>(p, row), bias = load_bias<T, Order>(p, row);
        ptx::barrier_wait(arrived, 0);
        float c[4] = {};
        const float4* from = sums + piece * 32;
#pragma unroll 4
        for (int source = 0; source < p.slices * C::kWays; ++source, from += p.part * C::kJ * 32) {
            c[0] += from->x, c[1] += from->y, c[2] += from->z, c[3] += from->w;
        }
        store_unit<T, Order>(p, c, row, piece % C::kJ * 8, scale, bias);
    }
}

// Leave this warp's sums with the block that stores them, and store this block's share. `arrived` counts the bytes of
// the other block.
template <typename T, typename C, typename Order>
__device__ __forceinline__ void add_up(const StreamParams& p, const float (&acc)[C::kI][C::kJ][4], char* shared,
                                       uint32_t arrived, const Place& place, int rank, int row_group, int way) {
    float4* sums = reinterpret_cast<float4*>(shared + p.sums) + threadIdx.x % 32;
    float4* mine = sums + (rank * C::kWays + way) * p.part * C::kJ * 32;
#pragma unroll
    for (int i = 0; i < C::kI; ++i) {
        const int block = row_group * C::kI + i;
        if (block >= place.blocks) continue;
        const int owner = block >= p.part;
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            float4* to = mine + ((block - owner * p.part) * C::kJ + j) * 32;
            const float (&c)[4] = acc[i][j];
            if (owner == rank) {
                *to = make_float4(c[0], c[1], c[2], c[3]);
            } else {
                ptx::store_remote(shared_address(to), c[0], c[1], c[2], c[3], arrived, owner);
            }
        }
    }
    consumer_barrier<32 * kWarps>();
    store_sums<T, C, Order>(p, sums, arrived, place, rank);
}

// The barriers: of the weights' stages full, then empty, of the tokens' stages the same, `arrived`.
template <typename C>
__device__ __forceinline__ void init(const StreamParams& p, uint32_t barriers, uint32_t arrived, int rank) {
    for (int ring = 0; ring < 2; ++ring) {
        for (int stage = 0; stage < (ring == 0 ? p.weight_stages : p.token_stages); ++stage) {
            const uint32_t full = barriers + 16 * kMostStages * ring + 8 * stage;
            ptx::barrier_init(full, 1);
            ptx::barrier_init(full + 8 * kMostStages, 32 * kWarps);  // every lane for itself
        }
    }
    ptx::barrier_init(arrived, 1);
    ptx::barrier_init_fence();
    const int own = min(p.part, place_of<C>(p, blockIdx.x / p.slices).blocks - rank * p.part);
    ptx::barrier_arrive_expect(arrived, (p.slices - 1) * C::kWays * max(0, own) * C::kJ * 512);
}

template <typename T, typename C>
__global__ __launch_bounds__(kThreads, 2) void w4a16_stream_kernel(const __grid_constant__ StreamParams p,
                                                                   const __grid_constant__ CUtensorMap token_map) {
    extern __shared__ __align__(1024) char shared[];
    const uint32_t address = shared_address(shared), barriers = address + p.barriers;
    const uint32_t arrived = barriers + 32 * kMostStages;
    ptx::launch_dependents();
    const int rank = p.slices > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const Share share(p, C::kSteps, rank);
    Ring weight_ring(barriers, p.weight_stages), token_ring(barriers + 16 * kMostStages, p.token_stages);
    const auto sync = [&] {
        if (p.slices > 1) {
            ptx::cluster_arrive();
            ptx::cluster_wait();
        } else {
            ptx::sync_block();
        }
    };
    if (warp >= kWarps) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (warp == kWarps) {
        if (lane == 0) init<C>(p, barriers, arrived, rank);
        __syncwarp();
        copy_weights<C>(p, address, weight_ring, share, sync);
        return;
    }
    sync();
    if (warp > kWarps) {
        if (warp == kWarps + 1 && lane == 0) {
            ptx::prefetch_map(&token_map);
            ptx::wait_for_dependencies();
            copy_tokens<C>(p, &token_map, address, token_ring, share);
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
    const int row_group = warp % C::kRowGroups, way = warp / C::kRowGroups;
    const Tokens<C> tokens(p.copied, way);
    const char* weights = shared + p.weights + (way * p.height + row_group * C::kI) * C::kBlock;
    const int repeat_bytes = C::kWays * p.height * C::kBlock;
    for (int tile = blockIdx.x / p.slices; tile < p.tiles; tile += gridDim.x / p.slices) {
        const Place place = place_of<C>(p, tile);
        const int steps =
            row_group * C::kI < place.blocks ? (p.steps - way + C::kWays - 1) / C::kWays : 0;  // this warp's
        const int whole = steps / C::kRepeat;  // chunks of which it has all of its steps
        float acc[C::kI][C::kJ][4] = {};
        for (int chunk = share.begin; chunk < share.end; ++chunk) {
            ptx::barrier_wait(weight_ring.is_full(), weight_ring.parity);
            ptx::barrier_wait(token_ring.is_full(), token_ring.parity);
            const char* from = weights + weight_ring.stage * p.weight_bytes;
            const uint32_t stage = address + token_ring.stage * p.token_bytes;
            if (chunk < whole) {
#pragma unroll
                for (int repeat = 0; repeat < C::kRepeat; ++repeat) {
                    multiply_step<T, C>(acc, from + repeat * repeat_bytes, stage, tokens, repeat);
                }
            } else if (C::kRepeat == 2 && chunk * C::kRepeat < steps) {
                multiply_step<T, C>(acc, from, stage, tokens, 0);
            }
            ptx::barrier_arrive(weight_ring.is_empty());
            ptx::barrier_arrive(token_ring.is_empty());
            weight_ring.next(), token_ring.next();
        }
        with_order(p, [&](auto order) {
            using Order = decltype(order);
            if constexpr (C::kWhole) {
                store_tile<T, Order>(p, acc, place, Rows{row_group * C::kI, 1});
            } else {
                add_up<T, C, Order>(p, acc, shared, arrived, place, rank, row_group, way);
            }
        });
    }
}

// x in boxes of `rows` tokens x 64 columns x `planes`; 0 where k ends inside a plane: only a flat map fills that with
// zeros.
inline const char* describe_planes(const W4A16Problem& problem, int rows, int planes, CUtensorMap* map) {
    const EncodeTiled encode = encode_tiled();
    if (encode == nullptr) return "w4a16: the driver has no cuTensorMapEncodeTiled";
    const cuuint64_t k = problem.k;
    const cuuint64_t sizes[3] = {planes ? 64 : k, static_cast<cuuint64_t>(problem.m), planes ? k / 64 : 1};
    const cuuint64_t strides[2] = {2 * k, 128};
    const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(planes ? planes : 1)},
                     element_strides[3] = {1, 1, 1};
    const CUresult result =
        encode(map, problem.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
               const_cast<void*>(problem.x), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : "w4a16: the activations cannot be described to the copy engine";
}

// Clusters of two blocks that run at once, one block per multiprocessor.
inline const char* count_pairs(const void* kernel, const W4A16Device& device, int* pairs) {
    const char* error = count_clusters({kernel, 2, kThreads, kAllShared, 2}, pairs);
    if (*pairs > device.sm_count / 2) *pairs = device.sm_count / 2;
    return error;
}

template <typename T, typename C>
const char* run(const W4A16Problem& problem, const W4A16Device& device, int slices, cudaStream_t stream) {
    if (C::kWhole && slices > 1) return "w4a16_stream: too many rows for two slices";
    const void* kernel = reinterpret_cast<const void*>(w4a16_stream_kernel<T, C>);
    if (const char* why = allow_shared(kernel, kAllShared)) return why;
    static int pairs = 0;
    if (slices == 2 && pairs == 0) {
        if (const char* why = count_pairs(kernel, device, &pairs)) return why;
    }
    const int clusters = slices == 2 ? pairs : device.sm_count;
    StreamParams p;
    static_cast<Params&>(p) = make_params(problem, kW4A16Panel, 8 * C::kJ);
    const int units = (p.n / kRowBlock + C::kUnit - 1) / C::kUnit, most = C::kMostBlocks / C::kUnit;
    const int rounds = (units + clusters * most - 1) / (clusters * most);
    if (rounds > 1 && !C::kWhole) {  // a device that holds fewer pairs than its multiprocessors would make
        return slices == 2 ? run<T, C>(problem, device, 1, stream) : "w4a16_stream: too many rows";
    }
    p.slices = slices;
    p.tiles = rounds * clusters < units ? rounds * clusters : units;
    divide(p, units, p.tiles);
    p.height = (p.share + (p.longer > 0)) * C::kUnit;
    p.part = (p.height + slices - 1) / slices;
    // The loop reads kI row blocks without asking. Those that a tile lacks are room that nobody writes, not another
    // step, another stage or the sums; what comes of them is dropped.
    p.height = (p.height + C::kI - 1) / C::kI * C::kI;
    p.copied = C::kJ == 1 ? problem.m : 16;
    p.planes = problem.k % 64 == 0;
    p.token_bytes = (256 * C::kSteps * p.copied + 1023) / 1024 * 1024;
    p.weight_bytes = C::kSteps * p.height * C::kBlock;
    const int sum_bytes = C::kWhole ? 0 : slices * C::kWays * p.part * C::kJ * 512;
    const int chunks = (p.steps + C::kSteps * slices - 1) / (C::kSteps * slices);
    // Weights are asked for long before they are needed, tokens only when the previous kernel has ended: all weights,
    // if they fit, else half of the memory for either.
    const int budget = kSharedBytes - sum_bytes - kBarrierBytes;
    const int all = rounds == 1 && chunks < kMostStages ? chunks : kMostStages;
    const auto weight_stages = [&](int token_stages) {
        const int fit = (budget - token_stages * p.token_bytes) / p.weight_bytes;
        return fit < all ? fit : all;
    };
    p.token_stages = 4;
    while (p.token_stages > 2 && weight_stages(p.token_stages) < all) --p.token_stages;
    if (weight_stages(p.token_stages) < all) {
        p.token_stages = 4;
        while (p.token_stages > 2 && p.token_stages * p.token_bytes > budget / 2) --p.token_stages;
    }
    p.weight_stages = weight_stages(p.token_stages);
    if (p.weight_stages < 1) return "w4a16_stream: a stage is too large";
    p.weights = p.token_stages * p.token_bytes;
    p.sums = (p.weights + p.weight_stages * p.weight_bytes + 15) / 16 * 16;
    p.barriers = (p.sums + sum_bytes + 7) / 8 * 8;
    CUtensorMap token_map;
    if (const char* why = describe_planes(problem, p.copied, p.planes ? 2 * C::kSteps : 0, &token_map)) return why;
    return launch(
        {kernel, (p.tiles < clusters ? p.tiles : clusters) * slices, kThreads, kSharedBytes, slices > 1 ? slices : 0},
        p, token_map, device, stream);
}

struct Stream {
    template <typename T, int kGroups, int kJ>
    static const char* run(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
        if (problem.m > 8 * kJ) return "w4a16_stream: too many tokens";
        const int blocks = problem.n / kRowBlock, pairs = device.sm_count / 2;
        const int slices = problem.slices != 0 ? problem.slices : blocks <= 6 * pairs ? 2 : 1;
        if (slices > 2) return "w4a16_stream: at most two slices";
        const int height = (blocks + device.sm_count / slices - 1) / (device.sm_count / slices);
        if (height <= 4) return w4a16::run<T, Config<kGroups, kJ, 2, 4, 1>>(problem, device, slices, stream);
        if constexpr (kJ == 1) {  // for 16 tokens the registers do not suffice
            if (height <= 6) return w4a16::run<T, Config<kGroups, kJ, 3, 4, 1>>(problem, device, slices, stream);
        }
        if (height <= 8) return w4a16::run<T, Config<kGroups, kJ, 2, 2, 1>>(problem, device, slices, stream);
        return w4a16::run<T, Config<kGroups, kJ, 2, 1, 2>>(problem, device, slices, stream);
    }
    template <typename T, int kGroups>
    static const char* run(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
        switch (problem.kernel) {
            case W4A16Kernel::kStream8:
                return run<T, kGroups, 1>(problem, device, stream);
            case W4A16Kernel::kStream16:
                return run<T, kGroups, 2>(problem, device, stream);
            default:
                return "w4a16_stream: not a kernel of this file";
        }
    }
};

}  // namespace
}  // namespace vllm_sparse::w4a16

namespace vllm_sparse {

const char* w4a16_stream(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    return w4a16::dispatch<w4a16::Stream>(problem, device, stream);
}

}  // namespace vllm_sparse
