// W4A16 2:4 sparse linear for few tokens on Hopper: mma.sp with the weights as the sparse operand, divided by Stream-K
// into equal runs of steps, one block per multiprocessor. A block is small enough that the next kernel's block stands
// beside it and fills its stages while this one works (programmatic dependent launch).
#include "w4a16_common.cuh"

namespace vllm_sparse::w4a16 {
namespace {

template <int kGroups_, int kJ_>
struct Config {
    static constexpr int kGroups = kGroups_;  // scales per row and step; 0: one scale per channel, applied at the end
    static constexpr int kJ = kJ_;            // tiles of 8 tokens
    static constexpr int kI = 2;              // row blocks per warp
    static constexpr int kBlocks = kPanelBlocks;
    static constexpr int kWarps = kBlocks / kI;
    static constexpr int kConsumers = 32 * kWarps;
    static constexpr int kThreads = kConsumers + 128;  // a whole warpgroup copies and gives registers away
    static constexpr int kTokens = 8 * kJ;
    static constexpr int kTokenBytes = 2 * kTokens * kStep;  // two halves of 64 columns, rows of 128 swizzled bytes
    static constexpr int kWeightBytes = kBlocks * kBlockBytes<kGroups>;
    static constexpr int kFit = 110 * 1024 / (kTokenBytes + kWeightBytes);  // half of a multiprocessor's shared memory
    static constexpr int kStages = kFit < 12 ? kFit : 12;
    using Memory = Shared<kTokenBytes, kWeightBytes, kStages>;
    using Cutting = StreamK<kBlocks, kTokens>;
    using Whole = Sliced<kTokens, kI>;
    static_assert(Memory::kBytes <= 113 * 1024);
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

// acc += one step. No branch inside, so that the row blocks hide each other's latencies: columns beyond k meet tokens
// that the copy engine has set to zero.
template <typename T, typename C>
__device__ __forceinline__ void multiply_step(float (&acc)[C::kI][C::kJ][4], const char* weights, uint32_t tokens) {
    const int lane = threadIdx.x % 32;
    constexpr int kGroups = C::kGroups == 0 ? 1 : C::kGroups, kUnitsPerGroup = kUnits / kGroups;
    uint32_t b[kUnits][C::kJ][4];
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            const int piece = (unit % 2 * 4 + lane / 8) ^ lane % 8;  // 16-byte pieces, as the copy engine swizzles them
            load_tokens(b[unit][j],
                        tokens + lane % 8 * 128 + unit / 2 * (C::kTokenBytes / 2) + 8 * j * 128 + piece * 16);
        }
    }
#pragma unroll
    for (int i = 0; i < C::kI; ++i) {
        const char* block = weights + i * kBlockBytes<C::kGroups>;
        const uint4 codes = reinterpret_cast<const uint4*>(block)[lane];
        const uint2 positions = reinterpret_cast<const uint2*>(block + kCodeBytes)[lane];
        const uint32_t words[kUnits] = {codes.x, codes.y, codes.z, codes.w};
        const uint32_t* scales = reinterpret_cast<const uint32_t*>(block + kCodeBytes + kPositionBytes);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            float part[C::kJ][4] = {};
#pragma unroll
            for (int unit = group * kUnitsPerGroup; unit < (group + 1) * kUnitsPerGroup; ++unit) {
                uint32_t a[4];
                decode(words[unit], a, T());
#pragma unroll
                for (int j = 0; j < C::kJ; ++j) {
                    float (&d)[4] = C::kGroups == 0 ? acc[i][j] : part[j];
                    if (unit % 2 == 0) {
                        mma<T, 0>(d, a, b[unit][j], d, unit < 2 ? positions.x : positions.y);
                    } else {
                        mma<T, 1>(d, a, b[unit][j], d, unit < 2 ? positions.x : positions.y);
                    }
                }
            }
            if constexpr (C::kGroups > 0) {
                const float2 scale = unpack(scales[lane / 4 * C::kGroups + group], T());
#pragma unroll
                for (int j = 0; j < C::kJ; ++j) {
                    acc[i][j][0] += scale.x * part[j][0], acc[i][j][1] += scale.x * part[j][1];
                    acc[i][j][2] += scale.y * part[j][2], acc[i][j][3] += scale.y * part[j][3];
                }
            }
        }
    }
}

// ---- tiles cut by the edges of shares ------------------------------------------------------------------------------
//
// The blocks first ... last of a cut tile leave their parts in the workspace, and each adds up an equal share of the
// tile, in the order of the blocks. A fence and a counter would cost three more trips to L2, beside the weights that
// the next kernel asks for; instead every word says itself whether it is there: it is kAbsent before it is written and
// after it is read. Waiting is safe because all blocks of a cut tile run at once: the grid is no larger than the
// device, and a later kernel of the stream starts only after all of them have.

constexpr uint32_t kAbsent = 0xffffffffu;  // a NaN that no arithmetic gives

struct Cut {
    int tile, first, last;
};

template <typename C>
__device__ __forceinline__ uint4* part_of(const Params& p, int block, int first) {
    // A block leaves at most two parts: number 0 of a tile begun before its share, number 1 of one that ends after it.
    return reinterpret_cast<uint4*>(p.words) +
           static_cast<int64_t>(2 * block + (block == first)) * (C::kBlocks * C::kJ * 32) + threadIdx.x % 32;
}

__device__ __forceinline__ void store_words(uint4* to, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ uint4 load_words(const uint4* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ bool absent(uint4 v) {
    return v.x == kAbsent || v.y == kAbsent || v.z == kAbsent || v.w == kAbsent;
}

__device__ __forceinline__ uint32_t present(float v) {
    const uint32_t bits = __float_as_uint(v);
    return bits == kAbsent ? 0x7fffffffu : bits;
}

// `block0`: this warp's first row block. What does not exist is not written, since nobody would read and clear it.
template <typename C>
__device__ __forceinline__ void publish(const Params& p, const float (&acc)[C::kI][C::kJ][4], const Cut& cut,
                                        int block0, const Place& place) {
    const int tokens = p.m - place.token;
    uint4* mine = part_of<C>(p, blockIdx.x, cut.first) + block0 * C::kJ * 32;
#pragma unroll
    for (int i = 0; i < C::kI; ++i) {
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            const float (&c)[4] = acc[i][j];
            if (block0 + i >= place.blocks || 8 * j + 2 * (threadIdx.x % 4) >= tokens) continue;
            store_words(mine + (i * C::kJ + j) * 32, {present(c[0]), present(c[1]), present(c[2]), present(c[3])});
        }
    }
}

// `warp` numbers the warps: those of the two tiles of a block start at different ones and wait at the same time.
template <typename T, typename C>
__device__ __forceinline__ void add_up(const Params& p, const Cut& cut, int warp) {
    constexpr int kPieces = C::kBlocks * C::kJ, kAtOnce = 10;
    const int parts = cut.last - cut.first + 1, rank = blockIdx.x - cut.first;
    const int row_tile = cut.tile / p.token_tiles, token0 = cut.tile % p.token_tiles * C::kTokens;
    const int end = (rank + 1) * kPieces / parts, tokens = p.m - token0;
    for (int piece = rank * kPieces / parts + warp; piece < end; piece += C::kWarps) {
        const int j = piece % C::kJ, row = (row_tile * C::kBlocks + piece / C::kJ) * kRowBlock;
        if (8 * j >= tokens || row >= p.n) continue;
        const float2 scale = load_channel_scale(p, row), bias = load_bias<T>(p, row);
        float c[4] = {};
        if (8 * j + 2 * (threadIdx.x % 4) < tokens) {
            for (int block = cut.first; block <= cut.last; block += kAtOnce) {
                uint4 v[kAtOnce];
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    if (block + i <= cut.last) v[i] = load_words(part_of<C>(p, block + i, cut.first) + piece * 32);
                }
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    if (block + i > cut.last) continue;
                    uint4* from = part_of<C>(p, block + i, cut.first) + piece * 32;
                    while (absent(v[i])) v[i] = load_words(from);
                    store_words(from, {kAbsent, kAbsent, kAbsent, kAbsent});
                    c[0] += __uint_as_float(v[i].x), c[1] += __uint_as_float(v[i].y);
                    c[2] += __uint_as_float(v[i].z), c[3] += __uint_as_float(v[i].w);
                }
            }
        }
        __syncwarp();
        store_unit<T>(p, c, row, token0 + 8 * j, scale, bias);
    }
}

template <typename T, typename C, typename Work>
__global__ __launch_bounds__(C::kThreads, 2) void w4a16_stream_kernel(const __grid_constant__ Params p,
                                                                      const __grid_constant__ CUtensorMap token_map) {
    constexpr bool kCutting = std::is_same_v<Work, typename C::Cutting>;
    extern __shared__ char unaligned[];
    char* shared = align_shared(unaligned);
    using S = typename C::Memory;
    const uint32_t address = shared_address(shared);
    ptx::launch_dependents();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (warp >= C::kWarps) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x == C::kConsumers) init_barriers<S>(address, C::kWarps);
        __syncthreads();
        if (lane == 0 && (warp - C::kWarps < kProducers || !kCutting)) {
            produce<S, Work, C::kGroups>(p, &token_map, address, warp - C::kWarps, [] {});
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
    __syncthreads();
    const int block0 = warp * C::kI;
    const char* weights = shared + S::kWeights + block0 * kBlockBytes<C::kGroups>;
    Cut head{-1, 0, 0}, tail{-1, 0, 0};
    uint32_t parity = 0;
    int stage = 0;
    for (Work work(p); work.valid(p); work.next(p)) {
        const Place place = work.place(p);
        float acc[C::kI][C::kJ][4] = {};
        for (int step = work.begin; step < work.end; ++step) {
            ptx::barrier_wait(address + S::kFull + 8 * stage, parity);
            if (block0 < place.blocks) {
                multiply_step<T, C>(acc, weights + stage * C::kWeightBytes, address + stage * C::kTokenBytes);
            }
            __syncwarp();
            if (lane == 0) ptx::barrier_arrive(address + S::kEmpty + 8 * stage);
            if (++stage == C::kStages) stage = 0, parity ^= 1;
        }
        if (!kCutting || (work.begin == 0 && work.end == p.steps)) {
            store_tile<T>(p, acc, place, Rows{block0, 1});
            continue;
        }
        const Cut cut{work.tile, share_of(work.tile * p.steps, p), share_of((work.tile + 1) * p.steps - 1, p)};
        publish<C>(p, acc, cut, block0, place);
        (work.begin > 0 ? head : tail) = cut;
    }
    if (!kCutting) return;
    if (head.tile >= 0) add_up<T, C>(p, head, warp);
    if (tail.tile >= 0) add_up<T, C>(p, tail, (warp + C::kWarps / 2) % C::kWarps);
}

// Whole tiles of at least half a panel for every block, if there are so many rows, else equal runs of steps.
template <typename T, typename C>
const char* run(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    Params p = make_params(problem, kW4A16Panel, C::kTokens);
    Launch how{nullptr, C::kThreads, C::Memory::kBytes, device.sm_count, 1};
    const int blocks = p.n / kRowBlock;
    if (blocks >= C::kBlocks / 2 * device.sm_count) {
        const int rounds = (blocks + C::kBlocks * device.sm_count - 1) / (C::kBlocks * device.sm_count);
        how.kernel = reinterpret_cast<const void*>(w4a16_stream_kernel<T, C, typename C::Whole>);
        divide(p, (blocks + C::kI - 1) / C::kI, rounds * device.sm_count);
        p.tiles = rounds * device.sm_count * p.token_tiles;
    } else {
        how.kernel = reinterpret_cast<const void*>(w4a16_stream_kernel<T, C, typename C::Cutting>);
        p.words = static_cast<char*>(problem.workspace) + words_offset(device.sm_count);
        const int steps = p.tiles * p.steps;
        if (steps < how.blocks) how.blocks = steps;
        divide(p, steps, how.blocks);
    }
    return launch(how, p, problem, device, C::kTokens, stream);
}

struct Stream {
    template <typename T, int kGroups>
    static const char* run(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
        switch (problem.kernel) {
            case W4A16Kernel::kStream8:
                return w4a16::run<T, Config<kGroups, 1>>(problem, device, stream);
            case W4A16Kernel::kStream16:
                return w4a16::run<T, Config<kGroups, 2>>(problem, device, stream);
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
