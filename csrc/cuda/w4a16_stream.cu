// W4A16 2:4 sparse linear for few tokens on Hopper: mma.sp with the weights as the sparse operand, divided by Stream-K
// into equal runs of steps, one block per multiprocessor. A block is small enough that the next kernel's block stands
// beside it and fills its stages while this one works (programmatic dependent launch).
//
// Each warp multiplies four row blocks of one step in straight-line code; two sets of four warps take turns at the
// steps and add up at a tile's end.
#include "w4a16_common.cuh"

namespace vllm_sparse::w4a16 {
namespace {

#ifndef STREAM_SHARED
#define STREAM_SHARED 112
#endif
#ifndef STREAM_SETS
#define STREAM_SETS 2
#endif
#ifndef STREAM_ROWWARPS
#define STREAM_ROWWARPS 4
#endif
#ifndef STREAM_MINBLOCKS
#define STREAM_MINBLOCKS 2
#endif
#ifndef STREAM_REGS
#define STREAM_REGS 104
#endif

#ifdef TRACE
__device__ unsigned long long trace[132 * 8];
__device__ __forceinline__ unsigned long long now() { unsigned long long t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t; }
#define MARK(i) if (threadIdx.x == 0) trace[blockIdx.x * 8 + i] = now()
#else
#define MARK(i)
#endif

template <int kGroups_, int kJ_>
struct Config {
    static constexpr int kGroups = kGroups_;  // scales per row and step; 0: one scale per channel, applied at the end
    static constexpr int kJ = kJ_;            // tiles of 8 tokens
    static constexpr int kSets = STREAM_SETS;           // sets of warps that take turns at the steps
    static constexpr int kRowWarps = STREAM_ROWWARPS;   // warps of a set
    static constexpr int kBlocks = kPanelBlocks;
    static constexpr int kI = kBlocks / kRowWarps;  // row blocks per warp
    static constexpr int kWarps = kSets * kRowWarps;
    static constexpr int kConsumers = 32 * kWarps;
    static constexpr int kThreads = kConsumers + 128;
    static constexpr int kTokens = 8 * kJ;
    static constexpr int kTokenBytes = 2 * kTokens * kStep;
    static constexpr int kWeightBytes = kBlocks * kBlockBytes<kGroups>;
    static constexpr int kExchangeBytes = kSets == 1 ? 0 : kBlocks * 512;
    static constexpr int kFit = (STREAM_SHARED * 1024 - kExchangeBytes - 1024 - 512) / (kTokenBytes + kWeightBytes);
    // Every stage belongs to one set, whose warps never wait for a barrier more than one phase ahead of it.
    static constexpr int kStages = (kFit < 14 ? kFit : 14) / kSets * kSets;
    using Memory = Shared<kTokenBytes, kWeightBytes, kStages>;
    using Work = StreamK<kBlocks, kTokens>;
    static constexpr int kExchange = (Memory::kLast + 16 + 127) / 128 * 128;
    static constexpr int kSharedBytes = kExchange + kExchangeBytes + 1024;
};

// d = a (16 rows x 32 columns, 2:4) * b (32 columns x 8 tokens) + c
template <typename T, int kSelector>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], float c0, float c1,
                                    float c2, float c3, uint32_t positions) {
#define VLLM_SPARSE_MMA(type)                                                                               \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type                \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%12, %13, %14, %15}, %16, %17;" \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),  \
                   "f"(c0), "f"(c1), "f"(c2), "f"(c3), "r"(positions), "n"(kSelector))
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        VLLM_SPARSE_MMA("bf16");
    } else {
        VLLM_SPARSE_MMA("f16");
    }
#undef VLLM_SPARSE_MMA
}

__device__ __forceinline__ void load_tokens(uint32_t (&b)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address)
                 : "memory");
}

#ifdef CORRECT
// 128 + code
__device__ __forceinline__ void decode_biased(uint32_t codes, uint32_t (&a)[4], __nv_bfloat16) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[r] = mask_or(codes >> (4 * r), 0x000f000fu, 0x43004300u);
}
__device__ __forceinline__ void decode_biased(uint32_t codes, uint32_t (&a)[4], __half) { decode(codes, a, __half()); }
#endif

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
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        const uint32_t* scales = reinterpret_cast<const uint32_t*>(block + kCodeBytes + kPositionBytes);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            float part[C::kJ][4];
#pragma unroll
            for (int unit = group * kUnitsPerGroup; unit < (group + 1) * kUnitsPerGroup; ++unit) {
                const uint32_t position = unit < 2 ? positions.x : positions.y;
                uint32_t a[4];
#ifdef CORRECT
                decode_biased(words[unit], a, T());
                const uint32_t minus[4] = {0xc308c308u, 0xc308c308u, 0xc308c308u, 0xc308c308u};
#else
                decode(words[unit], a, T());
#endif
#pragma unroll
                for (int j = 0; j < C::kJ; ++j) {
                    float (&d)[4] = C::kGroups == 0 ? acc[i][j] : part[j];
                    const bool fresh = C::kGroups != 0 && unit == group * kUnitsPerGroup;
                    const float c0 = fresh ? 0.f : d[0], c1 = fresh ? 0.f : d[1], c2 = fresh ? 0.f : d[2],
                                c3 = fresh ? 0.f : d[3];
                    if (unit % 2 == 0) {
                        mma<T, 0>(d, a, b[unit][j], c0, c1, c2, c3, position);
#ifdef CORRECT
                        if constexpr (std::is_same_v<T, __nv_bfloat16>) mma<T, 0>(d, minus, b[unit][j], d[0], d[1], d[2], d[3], position);
#endif
                    } else {
                        mma<T, 1>(d, a, b[unit][j], c0, c1, c2, c3, position);
#ifdef CORRECT
                        if constexpr (std::is_same_v<T, __nv_bfloat16>) mma<T, 1>(d, minus, b[unit][j], d[0], d[1], d[2], d[3], position);
#endif
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

// The two sets swap halves of their row blocks, 8 tokens at a time: set 0 gets the sums of the first ones, set 1 of the
// others.
template <typename C>
__device__ __forceinline__ void exchange(float (&sum)[C::kI / C::kSets][C::kJ][4],
                                         const float (&acc)[C::kI][C::kJ][4], float4* memory, int set, int row_warp) {
#if STREAM_SETS == 1
    for (int i = 0; i < C::kI; ++i) for (int j = 0; j < C::kJ; ++j) for (int c = 0; c < 4; ++c) sum[i][j][c] = acc[i][j][c];
#else
    constexpr int kHalf = C::kI / 2;
    float4* mine = memory + (set * C::kRowWarps + row_warp) * kHalf * 32 + threadIdx.x % 32;
    const float4* theirs = memory + ((1 - set) * C::kRowWarps + row_warp) * kHalf * 32 + threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < C::kJ; ++j) {
        consumer_barrier<C::kConsumers>();
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const float (&low)[4] = acc[i][j];
            const float (&high)[4] = acc[i + kHalf][j];
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[i][j][c] = set == 0 ? low[c] : high[c];
            mine[i * 32] = set == 0 ? make_float4(high[0], high[1], high[2], high[3])
                                    : make_float4(low[0], low[1], low[2], low[3]);
        }
        consumer_barrier<C::kConsumers>();
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const float4 other = theirs[i * 32];
            sum[i][j][0] += other.x, sum[i][j][1] += other.y, sum[i][j][2] += other.z, sum[i][j][3] += other.w;
        }
    }
#endif
}

// A tile cut by the edges of shares: the blocks first ... last each have a part of its steps.
struct Cut {
    int tile, first, last;
};

template <typename C>
__device__ __forceinline__ float4* part_of(const Params& p, int block, int first) {
    // A block leaves at most two parts: number 0 of a tile begun before its share, number 1 of one that ends after it.
    return reinterpret_cast<float4*>(p.partials) +
           static_cast<int64_t>(2 * block + (block == first)) * (C::kBlocks * C::kJ * 32) + threadIdx.x % 32;
}

template <typename C>
__device__ __forceinline__ void publish(const Params& p, const float (&sum)[C::kI / C::kSets][C::kJ][4], const Cut& cut,
                                        int block0, int tokens) {
    float4* mine = part_of<C>(p, blockIdx.x, cut.first) + block0 * C::kJ * 32;
#pragma unroll
    for (int i = 0; i < C::kI / C::kSets; ++i) {
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            const float (&c)[4] = sum[i][j];
            if (8 * j + 2 * (threadIdx.x % 4) < tokens)
                __stcg(mine + (i * C::kJ + j) * 32, make_float4(c[0], c[1], c[2], c[3]));
        }
    }
    consumer_barrier<C::kConsumers>();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(p.counters + cut.first, 1);
    }
}

// Every block of a cut tile adds up an equal part of it, in the order of the blocks. They all run at once: the grid is
// no larger than the device, and a later kernel starts only after all of them have.
template <typename T, typename C>
__device__ __forceinline__ void add_up(const Params& p, const Cut& cut) {
    const int parts = cut.last - cut.first + 1, rank = blockIdx.x - cut.first;
    if (threadIdx.x == 0) {
        int* counter = p.counters + cut.first;
        int arrived;
        do {
            asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
        } while (arrived < parts);
        if (atomicAdd(counter, 1) == 2 * parts - 1) *counter = 0;
    }
    consumer_barrier<C::kConsumers>();
    constexpr int kPieces = C::kBlocks * C::kJ;
    const int row_tile = cut.tile / p.token_tiles, token0 = cut.tile % p.token_tiles * C::kTokens;
    const int warp = threadIdx.x / 32, end = (rank + 1) * kPieces / parts;
    const int tokens = p.m - token0;
    for (int piece = rank * kPieces / parts + warp; piece < end; piece += C::kWarps) {
        const int i = piece / C::kJ, j = piece % C::kJ, row = (row_tile * C::kBlocks + i) * kRowBlock;
        if (8 * j >= tokens || row >= p.n) continue;
        const bool exists = 8 * j + 2 * (threadIdx.x % 4) < tokens;
        const float2 scale = load_channel_scale(p, row), bias = load_bias<T>(p, row);
        float c[4] = {};
#pragma unroll 4
        for (int block = cut.first; block <= cut.last; ++block) {
            float4 part = {};
            if (exists) part = __ldcg(part_of<C>(p, block, cut.first) + piece * 32);
            c[0] += part.x, c[1] += part.y, c[2] += part.z, c[3] += part.w;
        }
        store_unit<T>(p, c, row, token0 + 8 * j, scale, bias);
    }
}

#ifdef SHOW
template <int A, int B> struct Show; Show<Config<1, 1>::kStages, Config<1, 1>::kSharedBytes> show1; Show<Config<1, 2>::kStages, Config<1, 2>::kSharedBytes> show2;
Show<Config<4, 1>::kStages, Config<4, 1>::kSharedBytes> show3; Show<Config<4, 2>::kStages, Config<4, 2>::kSharedBytes> show4;
#endif
template <typename T, typename C>
__global__ __launch_bounds__(C::kThreads, STREAM_MINBLOCKS) void w4a16_stream_kernel(const __grid_constant__ Params p,
                                                                    const __grid_constant__ CUtensorMap token_map) {
    extern __shared__ char unaligned[];
    char* shared = align_shared(unaligned);
    using S = typename C::Memory;
    const uint32_t address = shared_address(shared);
    MARK(0);
    ptx::launch_dependents();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (warp >= C::kWarps) {
#if STREAM_REGS > 0
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
#endif
        if (threadIdx.x == C::kConsumers) init_barriers<S>(address, C::kRowWarps);
        __syncthreads();
        if (lane == 0 && warp - C::kWarps < kProducers) {
            produce<S, typename C::Work, C::kGroups>(p, &token_map, address, warp - C::kWarps, [] {});
        }
        return;
    }
#if STREAM_REGS > 0
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(STREAM_REGS));
#endif
    __syncthreads();
    const int set = warp / C::kRowWarps, row_warp = warp % C::kRowWarps;
    const char* weights = shared + S::kWeights + row_warp * C::kI * kBlockBytes<C::kGroups>;
    float acc[C::kI][C::kJ][4];
    uint32_t parity = 0;
    Cut head{-1, 0, 0}, tail{-1, 0, 0};
    int stage = set, skip = set;  // skip: steps until this set's next one
#ifdef TRACE
    bool first = true;
#endif
    for (typename C::Work work(p); work.valid(p); work.next(p)) {
#pragma unroll
        for (int i = 0; i < C::kI; ++i) {
#pragma unroll
            for (int j = 0; j < C::kJ; ++j) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.f;
        }
        int left = work.end - work.begin - skip;
        for (; left > 0; left -= C::kSets) {
            ptx::barrier_wait(address + S::kFull + 8 * stage, parity);
#ifdef TRACE
            if (first) { MARK(1); first = false; }
#endif
            multiply_step<T, C>(acc, weights + stage * C::kWeightBytes, address + stage * C::kTokenBytes);
            __syncwarp();
            if (lane == 0) ptx::barrier_arrive(address + S::kEmpty + 8 * stage);
            stage += C::kSets;
            if (stage >= C::kStages) stage -= C::kStages, parity ^= 1;
        }
        skip = -left;
        MARK(2);
#ifdef NOFINISH
        if (p.m > 100) 
#endif
        {
            float sum[C::kI / C::kSets][C::kJ][4];
            exchange<C>(sum, acc, reinterpret_cast<float4*>(shared + C::kExchange), set, row_warp);
            const Place place = work.place(p);
            const int block0 = row_warp * C::kI + set * (C::kI / C::kSets);
            if (work.begin == 0 && work.end == p.steps) {
                store_tile<T>(p, sum, place, Rows{block0, 1});
            } else {
                const Cut cut{work.tile, share_of(work.tile * p.steps, p), share_of((work.tile + 1) * p.steps - 1, p)};
                publish<C>(p, sum, cut, block0, p.m - place.token);
                if (work.begin > 0) {
                    head = cut;
                } else {
                    tail = cut;
                }
            }
        }
        MARK(3);
    }
    if (head.tile >= 0) add_up<T, C>(p, head);
    if (tail.tile >= 0) add_up<T, C>(p, tail);
    MARK(4);
}

template <typename T, typename C>
const char* run(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    Params p = make_params(problem, kW4A16Panel, C::kTokens);
    const int steps = p.tiles * p.steps;
    const Launch how{reinterpret_cast<const void*>(w4a16_stream_kernel<T, C>), C::kThreads, C::kSharedBytes,
                     steps < device.sm_count ? steps : device.sm_count, 1};
    divide(p, steps, how.blocks);
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
#ifdef TRACE
extern "C" int w4_trace(unsigned long long* to) { return cudaMemcpyFromSymbol(to, vllm_sparse::w4a16::trace, 132 * 8 * 8); }
#endif
