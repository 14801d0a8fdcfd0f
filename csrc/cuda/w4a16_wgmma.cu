// W4A16 2:4 sparse linear on Hopper's wgmma.sp (sm_90a): the sparse weights are dequantized in registers, the tokens
// come from shared memory. Two consumer warpgroups of 128 rows each; while the tensor cores work on one 64-row half of
// a warpgroup's step, the warpgroup dequantizes the other.
#include "w4a16_common.cuh"

namespace vllm_sparse::w4a16 {
namespace {

constexpr int kMaxSlices = 8;  // the largest portable cluster

template <int kGroups_, int kTokens_, int kStages_, int kHalves_>
struct Config {
    static constexpr int kGroups = kGroups_;
    static constexpr int kTokens = kTokens_;
    static constexpr int kStages = kStages_;
    // 64-row halves per consumer warpgroup. 1: four warpgroups hide each other's latencies, which few tokens need; 2:
    // two warpgroups of more registers, which many tokens need, each dequantizing one half while the other is
    // multiplied.
    static constexpr int kHalves = kHalves_;
    static constexpr int kBlocks = kPanelBlocks;
    static constexpr int kWarps = kBlocks / kHalves;
    static constexpr int kConsumers = 32 * kWarps;
    static constexpr int kThreads =
        kConsumers + 128;  // a whole warpgroup copies, so that its registers can go to the consumers
    static constexpr int kRegisters = kHalves == 1 ? 112 : 240;
    static constexpr int kTokenBytes = 2 * kTokens * kStep;  // two halves of 64 columns, rows of 128 swizzled bytes
    static constexpr int kWeightBytes = kBlocks * kBlockBytes<kGroups>;
    using Memory = Shared<kTokenBytes, kWeightBytes, kStages>;

    // Scale the sums of a step instead of its weights, where a step is one group and the sums are few.
    static constexpr bool kScaleSums = kGroups == 1 && kTokens <= 16;

    // The other blocks of the cluster leave their sums here: 512 bytes per MMA tile of 16 rows x 8 tokens.
    static constexpr int kJ = kTokens / 8;
    static constexpr int kUnits = kHalves * kJ * kWarps;
    static constexpr int kSumBytes = (kUnits + kMaxSlices) * 512;
    static constexpr bool kSumsInStages = kTokens > 64;  // too large to stand beside the stages
    static constexpr int kSums = kSumsInStages ? 0 : (Memory::kLast + 16 + 127) / 128 * 128;
    static constexpr int kSharedBytes = kSumsInStages ? Memory::kBytes : kSums + kSumBytes + 1024;
    static_assert(!kSumsInStages || kSumBytes <= Memory::kFull);
    static_assert(kSharedBytes <= 227 * 1024);

    // Estimates that choose the number of slices, in nanoseconds: one step, adding up a tile's slices.
    static constexpr int kStepTime = kTokens <= 32 ? 250 : kTokens <= 64 ? 500 : 650;
    static constexpr int kSumTime = kTokens <= 32 ? 1000 : kTokens <= 64 ? 1500 : 3500;
};

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keep the compiler from moving an accumulator's use across a fence or wait.
template <int kJ>
__device__ __forceinline__ void pin(float (&d)[kJ][4]) {
#pragma unroll
    for (int j = 0; j < kJ; ++j)
        asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}

#define D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define D8(j) D4(j), D4(j + 1)
#define D16(j) D4(j), D4(j + 1), D4(j + 2), D4(j + 3)
#define WGMMA(shape, type, registers, outputs, A, B, E, S, P)                                                 \
    asm volatile("{\n.reg .pred accumulate;\n.reg .b64 tokens;\nsetp.ne.b32 accumulate, %" #P                 \
                 ", 0;\n"                                                                                     \
                 "mov.b64 tokens, {%" #B                                                                      \
                 ", 0x40000040};\n"                                                                           \
                 "wgmma.mma_async.sp.sync.aligned.m64n" shape "k32.f32." type "." type " {" registers "}, " A \
                 ", tokens, %" #E ", %" #S ", accumulate, 1, 1, 0;\n}"                                        \
                 : outputs                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(tokens), "r"(positions), "n"(kSelector),   \
                   "r"(accumulate))
#define REGISTERS_4 "%0, %1, %2, %3"
#define REGISTERS_8 REGISTERS_4 ", %4, %5, %6, %7"
#define REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32 REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                   \
    REGISTERS_32                                                                       \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_8(type) WGMMA("8", type, REGISTERS_4, D4(0), "{%4, %5, %6, %7}", 8, 9, 10, 11)
#define WGMMA_16(type) WGMMA("16", type, REGISTERS_8, D8(0), "{%8, %9, %10, %11}", 12, 13, 14, 15)
#define WGMMA_32(type) WGMMA("32", type, REGISTERS_16, D16(0), "{%16, %17, %18, %19}", 20, 21, 22, 23)
#define WGMMA_64(type) WGMMA("64", type, REGISTERS_32, D16(0) COMMA D16(4), "{%32, %33, %34, %35}", 36, 37, 38, 39)
#define WGMMA_128(type)                                                                                              \
    WGMMA("128", type, REGISTERS_64, D16(0) COMMA D16(4) COMMA D16(8) COMMA D16(12), "{%64, %65, %66, %67}", 68, 69, \
          70, 71)
#define COMMA ,

// d[64 rows][tokens] = a (2:4, k = 32) * tokens (+ d). kSelector: which thread pair of a quad holds the positions.
template <typename T, int kSelector, int kJ>
__device__ __forceinline__ void wgmma(float (&d)[kJ][4], const uint32_t (&a)[4], uint32_t tokens, uint32_t positions,
                                      int accumulate) {
    constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
    static_assert(kJ == 1 || kJ == 2 || kJ == 4 || kJ == 8 || kJ == 16);
    if constexpr (kJ == 1 && kBf16) WGMMA_8("bf16");
    if constexpr (kJ == 1 && !kBf16) WGMMA_8("f16");
    if constexpr (kJ == 2 && kBf16) WGMMA_16("bf16");
    if constexpr (kJ == 2 && !kBf16) WGMMA_16("f16");
    if constexpr (kJ == 4 && kBf16) WGMMA_32("bf16");
    if constexpr (kJ == 4 && !kBf16) WGMMA_32("f16");
    if constexpr (kJ == 8 && kBf16) WGMMA_64("bf16");
    if constexpr (kJ == 8 && !kBf16) WGMMA_64("f16");
    if constexpr (kJ == 16 && kBf16) WGMMA_128("bf16");
    if constexpr (kJ == 16 && !kBf16) WGMMA_128("f16");
}

// Low word of the matrix descriptor of [tokens][64] 16-bit values in rows of 128 bytes with the 128-byte swizzle. The
// high word, 0x40000040, says swizzle (1 << 30) and 1024 bytes per 8 rows (64 << 0, in units of 16).
__device__ __forceinline__ uint32_t token_descriptor(uint32_t address) { return (address & 0x3ffff) >> 4 | 1u << 16; }

// wgmma may read the positions' registers while it runs, but the compiler takes them for free once it is issued. A
// store that never happens (`never` is false) after the wait keeps them; only then are the next positions loaded.
__device__ __forceinline__ void keep(uint2 positions, bool never, uint32_t address) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.shared.v2.b32 [%1], {%2, %3};\n}" ::"r"(
                     static_cast<int>(never)),
                 "r"(address), "r"(positions.x), "r"(positions.y)
                 : "memory");
}

__device__ __forceinline__ uint2 load_positions(uint32_t address) {
    uint2 positions;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(positions.x), "=r"(positions.y) : "r"(address) : "memory");
    return positions;
}

template <typename C>
struct Block {
    uint4 codes;
    uint32_t scales[C::kGroups == 0 ? 1 : C::kGroups];

    __device__ __forceinline__ Block(const char* from, int lane) {
        codes = reinterpret_cast<const uint4*>(from)[lane];
        const uint32_t* scale =
            reinterpret_cast<const uint32_t*>(from + kCodeBytes + kPositionBytes) + lane / 4 * C::kGroups;
#pragma unroll
        for (int group = 0; group < C::kGroups; ++group) scales[group] = scale[group];
    }
};

template <typename T, typename C>
__device__ __forceinline__ void dequantize(uint32_t (&a)[kUnits][4], const Block<C>& block) {
    const uint32_t words[kUnits] = {block.codes.x, block.codes.y, block.codes.z, block.codes.w};
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
        decode(words[unit], a[unit], T());
        if constexpr (C::kGroups > 0 && !C::kScaleSums) {
            using Two = typename Pair<T>::type;
            const uint32_t both = block.scales[unit * C::kGroups / kUnits];
            const Two low = bit_cast<Two>(__byte_perm(both, 0, 0x1010)),
                      high = bit_cast<Two>(__byte_perm(both, 0, 0x3232));
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                a[unit][r] = bit_cast<uint32_t>(__hmul2(bit_cast<Two>(a[unit][r]), r % 2 == 0 ? low : high));
            }
        }
    }
}

// sum += scale * part
template <typename T, int kJ>
__device__ __forceinline__ void add_scaled(float (&sum)[kJ][4], const float (&part)[kJ][4], uint32_t scales) {
    const float2 scale = unpack(scales, T());
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
        sum[j][0] += scale.x * part[j][0], sum[j][1] += scale.x * part[j][1];
        sum[j][2] += scale.y * part[j][2], sum[j][3] += scale.y * part[j][3];
    }
}

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_barrier_of_one_thread() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void store_remote(uint32_t address, int rank, const float (&c)[4]) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n}" ::"r"(address),
        "r"(rank), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])
        : "memory");
}

// Add the cluster's slices of a tile and store it. Every block adds up an equal part of the tile's MMA tiles ("units"),
// in the order of the slices.
template <typename T, typename C>
__device__ __forceinline__ void add_slices(const Params& p, float (&acc)[C::kHalves][C::kJ][4], char* shared,
                                           int row_tile, int token0) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % p.slices;
    const int share = (C::kUnits + p.slices - 1) / p.slices, reciprocal = 65536 / share + 1;
    const int tokens = p.m - token0;
    char* sums = shared + C::kSums;
    cluster_barrier();  // every block is done with the memory that the sums go to
#pragma unroll
    for (int i = 0; i < C::kHalves; ++i) {
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            const int unit = (i * C::kJ + j) * C::kWarps + warp, to = unit * reciprocal >> 16;
            const uint32_t address = shared_address(sums) + ((rank * share + unit - to * share) * 32 + lane) * 16;
            if (8 * j < tokens) store_remote(address, to, acc[i][j]);
        }
    }
    cluster_barrier();
    for (int local = warp; local < share && rank * share + local < C::kUnits; local += C::kWarps) {
        const int unit = rank * share + local, tile = unit / C::kWarps, i = tile / C::kJ, j = tile % C::kJ,
                  owner = unit % C::kWarps;
        const int row = (row_tile * C::kBlocks + owner / 4 * 4 * C::kHalves + owner % 4 + 4 * i) * kRowBlock;
        if (8 * j >= tokens || row >= p.n) continue;
        float c[4] = {};
        for (int slice = 0; slice < p.slices; ++slice) {
            const float4 part = reinterpret_cast<const float4*>(sums)[(slice * share + local) * 32 + lane];
            c[0] += part.x, c[1] += part.y, c[2] += part.z, c[3] += part.w;
        }
        store_unit<T>(p, c, row, token0 + 8 * j, load_channel_scale(p, row), load_bias<T>(p, row));
    }
    if constexpr (C::kSumsInStages) {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        cluster_barrier();  // the stages may be filled again
    }
}

template <typename T, typename C>
__global__ __launch_bounds__(C::kThreads, 1) void w4a16_wgmma_kernel(const __grid_constant__ Params p,
                                                                     const __grid_constant__ CUtensorMap token_map) {
    extern __shared__ char unaligned[];
    char* shared = align_shared(unaligned);
    using S = typename C::Memory;
    const uint32_t address = shared_address(shared);
    if (p.token_tiles == 1) let_next_start();  // with many tokens it would take room from our own blocks
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (warp >= C::kWarps) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == C::kConsumers) init_barriers<S>(address, C::kWarps);
        __syncthreads();
        const int producer = warp - C::kWarps;
        if (lane == 0 && producer < kProducers) {
            produce<S, Sliced, C::kGroups, C::kBlocks, C::kTokens>(p, &token_map, address, producer, [&] {
                if (p.slices == 1) return;
                for (int i = 0; i < (C::kSumsInStages ? 3 : 2); ++i) cluster_barrier_of_one_thread();
            });
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kRegisters));
    __syncthreads();
    constexpr uint32_t kHalf = C::kTokenBytes / 2 / 16;
    const Rows rows{warp / 4 * 4 * C::kHalves + warp % 4, 4};
    const char* weights0 = shared + S::kWeights + rows.first * kBlockBytes<C::kGroups>;
    const bool never = p.m < 0;
    float acc[C::kHalves][C::kJ][4], sum[C::kHalves][C::kJ][4];
    uint32_t a[C::kHalves][kUnits][4], scales[C::kHalves];
    uint2 positions[C::kHalves]{};
    uint32_t parity = 0;
    int stage = 0;
    for (Sliced work(p); work.valid(p); work.next(p)) {
        int previous = -1;
        if constexpr (C::kScaleSums) {
#pragma unroll
            for (int half = 0; half < C::kHalves; ++half) {
#pragma unroll
                for (int j = 0; j < C::kJ; ++j)
                    sum[half][j][0] = sum[half][j][1] = sum[half][j][2] = sum[half][j][3] = 0.f;
            }
        }
        for (int step = work.begin; step < work.end; ++step) {
            barrier_wait(address + S::kFull + 8 * stage, parity);
            const uint32_t tokens = token_descriptor(address + stage * C::kTokenBytes);
            const int accumulate = !C::kScaleSums && step > work.begin;
#pragma unroll
            for (int half = 0; half < C::kHalves; ++half) {
                const char* packed = weights0 + stage * C::kWeightBytes + 4 * half * kBlockBytes<C::kGroups>;
                const Block<C> block(packed, lane);
                wgmma_wait<C::kHalves - 1>();  // the oldest group in flight read a[half] and positions[half]
                keep(positions[half], never, address);
                if (half == C::kHalves - 1 && previous >= 0 && lane == 0)
                    barrier_arrive(address + S::kEmpty + 8 * previous);
                positions[half] = load_positions(shared_address(packed) + kCodeBytes + 8 * lane);
                pin(acc[half]);
                if constexpr (C::kScaleSums) {
                    if (step > work.begin) add_scaled<T>(sum[half], acc[half], scales[half]);
                    scales[half] = block.scales[0];
                }
                dequantize<T, C>(a[half], block);
                pin(acc[half]);
                wgmma_fence();
                wgmma<T, 0>(acc[half], a[half][0], tokens, positions[half].x, accumulate);
                wgmma<T, 1>(acc[half], a[half][1], tokens + 4, positions[half].x, 1);
                wgmma<T, 0>(acc[half], a[half][2], tokens + kHalf, positions[half].y, 1);
                wgmma<T, 1>(acc[half], a[half][3], tokens + kHalf + 4, positions[half].y, 1);
                wgmma_commit();
                pin(acc[half]);
            }
            previous = stage;
            if (++stage == C::kStages) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int half = 0; half < C::kHalves; ++half) {
            keep(positions[half], never, address);
            pin(acc[half]);
            if constexpr (C::kScaleSums) {
                add_scaled<T>(sum[half], acc[half], scales[half]);
#pragma unroll
                for (int j = 0; j < C::kJ; ++j) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) acc[half][j][c] = sum[half][j][c];
                }
            }
        }
        if (lane == 0) barrier_arrive(address + S::kEmpty + 8 * previous);
        const int row_tile = work.tile / p.token_tiles, token0 = work.tile % p.token_tiles * C::kTokens;
        if (p.slices == 1) {
            store_tile<T>(p, acc, row_tile * C::kBlocks, rows, token0);
        } else {
            add_slices<T, C>(p, acc, shared, row_tile, token0);
        }
    }
}

// How many clusters of `slices` blocks run at once; clusters do not span the chip's processing clusters (GPCs).
template <typename T, typename C>
int concurrent_clusters(int slices, const W4A16Device& device) {
    if (slices == 1) return device.sm_count;
    static int known[kMaxSlices + 1] = {};
    if (known[slices] == 0) {
        const auto kernel = reinterpret_cast<const void*>(w4a16_wgmma_kernel<T, C>);
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(slices), 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(slices * (device.sm_count / slices));
        config.blockDim = dim3(C::kThreads);
        config.dynamicSmemBytes = C::kSharedBytes;
        config.attrs = &attribute;
        config.numAttrs = 1;
        int clusters = 0;
        const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
        known[slices] = error == cudaSuccess && clusters > 0 ? clusters : 1;
    }
    const int all = device.sm_count / slices;
    return known[slices] < all ? known[slices] : all;
}

template <typename T, typename C>
const char* run(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    Params p = make_params(problem, kW4A16Panel, C::kTokens);
    const auto clusters = [&](int slices) {
        const int most = concurrent_clusters<T, C>(slices, device);
        return p.tiles < most ? p.tiles : most;
    };
    int64_t best = INT64_MAX;
    for (int slices = 1; slices <= kMaxSlices && slices <= p.steps; ++slices) {
        if (problem.slices != 0 && problem.slices != slices) continue;
        const int rounds = (p.tiles + clusters(slices) - 1) / clusters(slices);
        const int64_t time = static_cast<int64_t>(rounds) *
                             ((p.steps + slices - 1) / slices * C::kStepTime + (slices > 1) * C::kSumTime);
        if (time < best) best = time, p.slices = slices;
    }
    const Launch how{reinterpret_cast<const void*>(w4a16_wgmma_kernel<T, C>), C::kThreads, C::kSharedBytes,
                     p.slices * clusters(p.slices), p.slices};
    return launch(how, p, problem, device, C::kTokens, stream);
}

template <typename T, int kGroups>
const char* choose(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    switch (problem.kernel) {
        case W4A16Kernel::kWgmma8:
            return run<T, Config<kGroups, 8, 12, 1>>(problem, device, stream);
        case W4A16Kernel::kWgmma16:
            return run<T, Config<kGroups, 16, 10, 1>>(problem, device, stream);
        case W4A16Kernel::kWgmma32:
            return run<T, Config<kGroups, 32, 7, 1>>(problem, device, stream);
        case W4A16Kernel::kWgmma64:
            return run<T, Config<kGroups, 64, 5, 2>>(problem, device, stream);
        case W4A16Kernel::kWgmma128:
            return run<T, Config<kGroups, 128, 4, 2>>(problem, device, stream);
        default:
            return "w4a16_wgmma: not a kernel of this file";
    }
}

template <typename T>
const char* choose(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    switch (problem.group_size) {
        case -1:
            return choose<T, 0>(problem, device, stream);
        case 128:
            return choose<T, 1>(problem, device, stream);
        case 64:
            return choose<T, 2>(problem, device, stream);
        case 32:
            return choose<T, 4>(problem, device, stream);
        default:
            return "w4a16_wgmma: group size must be 32, 64, 128 or -1";
    }
}

}  // namespace
}  // namespace vllm_sparse::w4a16

namespace vllm_sparse {

const char* w4a16_wgmma(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    return problem.bf16 ? w4a16::choose<__nv_bfloat16>(problem, device, stream)
                        : w4a16::choose<__half>(problem, device, stream);
}

}  // namespace vllm_sparse
