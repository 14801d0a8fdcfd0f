// W4A16 2:4 sparse linear on Hopper's wgmma.sp (sm_90a): the sparse weights are dequantized in registers, the tokens
// come from shared memory. A tile has up to 256 rows, dealt out to the consumer warpgroups in units of 64; while the
// tensor cores work on one unit or step of a warpgroup, the warpgroup dequantizes the next.
#include "w4a16_common.cuh"

namespace vllm_sparse::w4a16 {
namespace {

constexpr int kMaxSlices = 8;  // the largest portable cluster

template <int kGroups_, int kTokens_, int kStages_, int kParts_>
struct Config {
    static constexpr int kGroups = kGroups_;
    static constexpr int kTokens = kTokens_;
    static constexpr int kStages = kStages_;
    // Units of 64 rows per consumer warpgroup. 1: four warpgroups hide each other's latencies, which few tokens need;
    // 2: two warpgroups of more registers, which many tokens need.
    static constexpr int kParts = kParts_;
    static constexpr int kBlocks = kPanelBlocks;
    static constexpr int kWarps = kBlocks / kParts;
    static constexpr int kWarpgroups = kWarps / 4;
    static constexpr int kConsumers = 32 * kWarps;
    static constexpr int kThreads =
        kConsumers + 128;  // a whole warpgroup copies, so that its registers can go to the consumers
    static constexpr int kRegisters = kParts == 1 ? 112 : 240;
    static constexpr int kCopyRegisters = kParts == 1 ? 32 : 24;
    static constexpr int kTokenBytes = 2 * kTokens * kStep;  // two halves of 64 columns, rows of 128 swizzled bytes
    static constexpr int kWeightBytes = kBlocks * kBlockBytes<kGroups>;
    using Memory = Shared<kTokenBytes, kWeightBytes, kStages>;
    using Work = Sliced<kTokens, kUnitBlocks>;

    // The other blocks of the cluster leave their sums here: 512 bytes per MMA tile of 16 rows x 8 tokens.
    static constexpr int kJ = kTokens / 8;
    static constexpr int kPieces = kBlocks * kJ;
    static constexpr int kSumBytes = (kPieces + kMaxSlices) * 512;
    static constexpr bool kSumsInStages = kTokens > 64;  // too large to stand beside the stages
    static constexpr int kSums = kSumsInStages ? 0 : (Memory::kLast + 16 + 127) / 128 * 128;
    static constexpr int kSharedBytes = kSumsInStages ? Memory::kBytes : kSums + kSumBytes + 1024;
    static_assert(!kSumsInStages || kSumBytes <= Memory::kFull);
    static_assert(kSharedBytes <= 227 * 1024);

    // Estimates that choose tiles and slices, in nanoseconds (decision 0059): a step of one to four units (four
    // warpgroups take as long for one as for all), adding up a tile's slices.
    static constexpr int step_time(int units) {
        constexpr int kTimes[4][4] = {
            {250, 250, 250, 250}, {245, 295, 475, 560}, {275, 365, 560, 720}, {400, 470, 690, 800}};
        return kTimes[kTokens / 32 - 1][units - 1];
    }
    static constexpr int kSumTime = kTokens == 32 ? 1000 : kTokens == 64 ? 3700 : kTokens == 96 ? 5000 : 6000;
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
#define REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32 REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_48 REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_64 REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_32(type) WGMMA("32", type, REGISTERS_16, D16(0), "{%16, %17, %18, %19}", 20, 21, 22, 23)
#define WGMMA_64(type) WGMMA("64", type, REGISTERS_32, D16(0) COMMA D16(4), "{%32, %33, %34, %35}", 36, 37, 38, 39)
#define WGMMA_96(type) \
    WGMMA("96", type, REGISTERS_48, D16(0) COMMA D16(4) COMMA D16(8), "{%48, %49, %50, %51}", 52, 53, 54, 55)
#define WGMMA_128(type)                                                                                              \
    WGMMA("128", type, REGISTERS_64, D16(0) COMMA D16(4) COMMA D16(8) COMMA D16(12), "{%64, %65, %66, %67}", 68, 69, \
          70, 71)
#define COMMA ,

// d[64 rows][tokens] = a (2:4, k = 32) * tokens (+ d). kSelector: which thread pair of a quad holds the positions.
template <typename T, int kSelector, int kJ>
__device__ __forceinline__ void wgmma(float (&d)[kJ][4], const uint32_t (&a)[4], uint32_t tokens, uint32_t positions,
                                      int accumulate) {
    constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
    static_assert(kJ == 4 || kJ == 8 || kJ == 12 || kJ == 16);
    if constexpr (kJ == 4 && kBf16) WGMMA_32("bf16");
    if constexpr (kJ == 4 && !kBf16) WGMMA_32("f16");
    if constexpr (kJ == 8 && kBf16) WGMMA_64("bf16");
    if constexpr (kJ == 8 && !kBf16) WGMMA_64("f16");
    if constexpr (kJ == 12 && kBf16) WGMMA_96("bf16");
    if constexpr (kJ == 12 && !kBf16) WGMMA_96("f16");
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

// bfloat16 with group scales: the multiplication that makes a nibble a number scales it, too. Scales below 2^28 stay
// finite, and the sums are small by kScaledUnit.
constexpr float kScaledUnit = 8589934592.f;  // 2^33

template <typename C>
__device__ __forceinline__ void dequantize_scaled(uint32_t (&a)[kUnits][4], const Block<C>& block) {
    const auto low_unit = bit_cast<__nv_bfloat162>(0x71807180u), high_unit = bit_cast<__nv_bfloat162>(0x6f806f80u);
    const auto minus_eight = bit_cast<__nv_bfloat162>(0xb080b080u);  // 2^100, 2^96; -2^-30
    const uint32_t words[kUnits] = {block.codes.x, block.codes.y, block.codes.z, block.codes.w};
    constexpr int kUnitsPerGroup = kUnits / C::kGroups;
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
        const uint32_t both = block.scales[group];
        const auto low = bit_cast<__nv_bfloat162>(__byte_perm(both, 0, 0x1010)),
                   high = bit_cast<__nv_bfloat162>(__byte_perm(both, 0, 0x3232));
        const auto low_scale = __hmul2(low, low_unit), high_scale = __hmul2(high, high_unit);
        const auto low_bias = __hmul2(low, minus_eight), high_bias = __hmul2(high, minus_eight);
#pragma unroll
        for (int unit = group * kUnitsPerGroup; unit < (group + 1) * kUnitsPerGroup; ++unit) {
            decode(words[unit], a[unit], low_scale, high_scale, low_bias, high_bias);
        }
    }
}

template <typename T, typename C>
constexpr bool kScalesInDecoding = C::kGroups > 0 && std::is_same_v<T, __nv_bfloat16>;

template <typename T, typename C>
__device__ __forceinline__ void dequantize(uint32_t (&a)[kUnits][4], const Block<C>& block) {
    if constexpr (kScalesInDecoding<T, C>) return dequantize_scaled(a, block);
    const uint32_t words[kUnits] = {block.codes.x, block.codes.y, block.codes.z, block.codes.w};
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
        decode(words[unit], a[unit], T());
        if constexpr (C::kGroups > 0) {
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

// Add the cluster's slices of a tile and store it. Every block adds up an equal part of the tile's MMA tiles
// ("pieces"), in the order of the slices.
template <typename T, typename C, typename Order>
__device__ __forceinline__ void add_slices(const Params& p, float (&acc)[C::kParts][C::kJ][4], char* shared,
                                           const Place& place) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x % p.slices;
    const int share = (C::kPieces + p.slices - 1) / p.slices, reciprocal = 65536 / share + 1;
    const int tokens = p.m - place.token;
    char* sums = shared + C::kSums;
    cluster_barrier();  // every block is done with the memory that the sums go to
#pragma unroll
    for (int i = 0; i < C::kParts; ++i) {
        if (i * C::kWarps + warp >= place.blocks) continue;
#pragma unroll
        for (int j = 0; j < C::kJ; ++j) {
            const int piece = (i * C::kJ + j) * C::kWarps + warp, to = piece * reciprocal >> 16;
            const uint32_t address = shared_address(sums) + ((rank * share + piece - to * share) * 32 + lane) * 16;
            if (8 * j < tokens) store_remote(address, to, acc[i][j]);
        }
    }
    cluster_barrier();
    for (int local = warp; local < share && rank * share + local < C::kPieces; local += C::kWarps) {
        const int piece = rank * share + local, column = piece / C::kWarps, i = column / C::kJ, j = column % C::kJ;
        const int block = i * C::kWarps + piece % C::kWarps, row = (place.block + block) * kRowBlock;
        if (8 * j >= tokens || block >= place.blocks) continue;
        float c[4] = {};
        for (int slice = 0; slice < p.slices; ++slice) {
            const float4 part = reinterpret_cast<const float4*>(sums)[(slice * share + local) * 32 + lane];
            c[0] += part.x, c[1] += part.y, c[2] += part.z, c[3] += part.w;
        }
        const float2 scale = load_channel_scale<Order>(p, row), bias = load_bias<T, Order>(p, row);
        store_unit<T, Order>(p, c, row, place.token + 8 * j, scale, bias);
    }
    if constexpr (C::kSumsInStages) {
        ptx::copy_engine_fence();
        cluster_barrier();  // the stages may be filled again
    }
}

// A consumer warpgroup's view of the ring of stages.
template <typename C>
struct Ring {
    using S = typename C::Memory;
    uint32_t address, parity = 0;
    int stage = 0;

    __device__ __forceinline__ void wait() const { ptx::barrier_wait(address + S::kFull + 8 * stage, parity); }
    __device__ __forceinline__ void release(int used) const { ptx::barrier_arrive(address + S::kEmpty + 8 * used); }
    __device__ __forceinline__ int next() {
        const int used = stage;
        if (++stage == C::kStages) stage = 0, parity ^= 1;
        return used;
    }
};

// The registers that a group of products in flight reads.
struct Operand {
    uint32_t a[kUnits][4];
    uint2 positions;
};

// acc += one step of 64 rows. The group in flight that reads `operand` is the oldest of at most two.
template <typename T, typename C>
__device__ __forceinline__ void multiply(float (&acc)[C::kJ][4], Operand& operand, const char* packed, uint32_t tokens,
                                         bool accumulate) {
    constexpr uint32_t kHalf = C::kTokenBytes / 2 / 16;
    operand.positions = load_positions(shared_address(packed) + kCodeBytes + 8 * (threadIdx.x % 32));
    const Block<C> block(packed, threadIdx.x % 32);
    dequantize<T, C>(operand.a, block);
    wgmma_fence();
    wgmma<T, 0>(acc, operand.a[0], tokens, operand.positions.x, accumulate);
    wgmma<T, 1>(acc, operand.a[1], tokens + 4, operand.positions.x, 1);
    wgmma<T, 0>(acc, operand.a[2], tokens + kHalf, operand.positions.y, 1);
    wgmma<T, 1>(acc, operand.a[3], tokens + kHalf + 4, operand.positions.y, 1);
    wgmma_commit();
}

// This warpgroup's kActive units of a tile, `steps` steps; two groups of products are in flight, either of the two
// units or of two steps. `weights`: its row blocks of a warp in the first stage.
template <typename T, typename C, int kActive>
__device__ __forceinline__ void multiply_steps(float (&acc)[C::kParts][C::kJ][4], Ring<C>& ring, int steps,
                                               const char* weights, bool never) {
    constexpr int kPartBytes = C::kWarps * kBlockBytes<C::kGroups>;
    Operand operand[2] = {};
    int held = -1;  // the stage that the last group in flight reads
    const auto tokens = [&] { return token_descriptor(ring.address + ring.stage * C::kTokenBytes); };
    if constexpr (kActive == 2) {
        for (int step = 0; step < steps; ++step) {
            ring.wait();
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                wgmma_wait<1>();
                keep(operand[part].positions, never, ring.address);
                if (part == 1 && held >= 0) ring.release(held);
                pin(acc[part]);
                multiply<T, C>(acc[part], operand[part], weights + ring.stage * C::kWeightBytes + part * kPartBytes,
                               tokens(), step > 0);
                pin(acc[part]);
            }
            held = ring.next();
        }
    } else {
        int before = -1;  // the stage that the group before it reads
        const auto one = [&](Operand& mine, bool accumulate) {
            ring.wait();
            wgmma_wait<1>();
            keep(mine.positions, never, ring.address);
            if (before >= 0) ring.release(before);
            multiply<T, C>(acc[0], mine, weights + ring.stage * C::kWeightBytes, tokens(), accumulate);
            before = held;
            held = ring.next();
        };
        int step = 0;
        for (; step + 1 < steps; step += 2) {
            one(operand[0], step > 0);
            one(operand[1], true);
        }
        if (step < steps) one(operand[0], step > 0);
        wgmma_wait<0>();
        if (before >= 0) ring.release(before);
    }
    wgmma_wait<0>();
    keep(operand[0].positions, never, ring.address);
    keep(operand[1].positions, never, ring.address);
    if (held >= 0) ring.release(held);
#pragma unroll
    for (int part = 0; part < kActive; ++part) pin(acc[part]);
}

template <typename T, typename C>
__global__ __launch_bounds__(C::kThreads, 1) void w4a16_wgmma_kernel(const __grid_constant__ Params p,
                                                                     const __grid_constant__ CUtensorMap token_map) {
    extern __shared__ char unaligned[];
    char* shared = align_shared(unaligned);
    using S = typename C::Memory;
    const uint32_t address = shared_address(shared);
    ptx::launch_dependents();  // all blocks of this grid run already: it is no larger than the device
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (threadIdx.x == C::kConsumers) init_barriers<S>(address, C::kConsumers);  // every lane gives stages back
    __syncthreads();
    if (warp >= C::kWarps) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kCopyRegisters));
        const int producer = warp - C::kWarps;
        if (lane == 0) {
            produce<S, typename C::Work, C::kGroups>(p, &token_map, address, producer, [&] {
                if (p.slices == 1) return;
                for (int i = 0; i < (C::kSumsInStages ? 3 : 2); ++i) cluster_barrier_of_one_thread();
            });
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kRegisters));
    const char* weights = shared + S::kWeights + warp * kBlockBytes<C::kGroups>;
    const bool never = p.m < 0;
    const int warpgroup = warp / 4;
    Ring<C> ring{address};
    float acc[C::kParts][C::kJ][4];
    for (typename C::Work work(p); work.valid(p); work.next(p)) {
        const int steps = work.end - work.begin;
        const Place place = work.place(p);
        const int units = (place.blocks + kUnitBlocks - 1) / kUnitBlocks;
        const int active = (units - warpgroup + C::kWarpgroups - 1) / C::kWarpgroups;
        if (C::kParts == 2 && active == 2) {
            multiply_steps<T, C, C::kParts>(acc, ring, steps, weights, never);
        } else if (active >= 1) {
            multiply_steps<T, C, 1>(acc, ring, steps, weights, never);
        } else {
            for (int step = 0; step < steps; ++step) {
                ring.wait();
                ring.release(ring.next());
            }
        }
        with_order(p, [&](auto order) {
            using Order = decltype(order);
            if (p.slices == 1) {
                store_tile<T, Order>(p, acc, place, {warp, C::kWarps});
            } else {
                add_slices<T, C, Order>(p, acc, shared, place);
            }
        });
    }
}

// How many clusters of `slices` blocks run at once; clusters do not span the chip's processing clusters (GPCs).
template <typename T, typename C>
int concurrent_clusters(int slices, const W4A16Device& device) {
    if (slices == 1) return device.sm_count;
    static int known[kMaxSlices + 1] = {};
    if (known[slices] == 0) {
        const auto kernel = reinterpret_cast<const void*>(w4a16_wgmma_kernel<T, C>);
        int clusters = 0;
        const char* error = allow_shared(kernel, C::kSharedBytes);
        if (error == nullptr) error = count_clusters({kernel, slices, C::kThreads, C::kSharedBytes, slices}, &clusters);
        known[slices] = error == nullptr && clusters > 0 ? clusters : 1;
    }
    const int all = device.sm_count / slices;
    return known[slices] < all ? known[slices] : all;
}

// How the work is divided, and how many nanoseconds that is estimated to take, beside what every launch takes.
struct Plan {
    Params params;
    int64_t time = INT64_MAX;
};

// Choose the number of slices and the row tiles, by the estimated time.
template <typename T, typename C>
Plan make_plan(const W4A16Problem& problem, const W4A16Device& device) {
    constexpr int kMost = kPanelBlocks / kUnitBlocks;
    Params p = make_params(problem, kW4A16Panel, C::kTokens);
    if (kScalesInDecoding<T, C>) p.unit = kScaledUnit;
    const int units = (p.n / kRowBlock + kUnitBlocks - 1) / kUnitBlocks, least = (units + kMost - 1) / kMost;
    // With several token tiles, sums of more than two slices take longer than the estimate.
    const int most_slices = p.token_tiles > 1 ? 2 : kMaxSlices;
    Plan best;
    for (int slices = 1; slices <= kMaxSlices && slices <= p.steps; ++slices) {
        if (problem.slices != 0 ? problem.slices != slices : slices > most_slices) continue;
        const int clusters = concurrent_clusters<T, C>(slices, device);
        const int rounds = (least * p.token_tiles + clusters - 1) / clusters;
        // Lower tiles fill the last round. In more than two rounds that gains nothing (measured: the power is the
        // limit).
        int row_tiles = rounds > 2 ? least : rounds * clusters / p.token_tiles;
        if (row_tiles > units) row_tiles = units;
        Params tried = p;
        tried.slices = slices;
        tried.tiles = row_tiles * p.token_tiles;
        divide(tried, units, row_tiles);
        int tall = (tried.longer * p.token_tiles + clusters - 1) / clusters;  // rounds with the taller tiles
        if (tall > rounds) tall = rounds;
        const int64_t steps = (p.steps + slices - 1) / slices;
        const int64_t step_times =
            tall * (tried.longer > 0 ? C::step_time(tried.share + 1) : 0) + (rounds - tall) * C::step_time(tried.share);
        const int64_t time = steps * step_times + (slices > 1) * rounds * C::kSumTime;
        if (time < best.time) best = {tried, time};
    }
    return best;
}

template <typename T, typename C>
const char* run(const Plan& plan, const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    if (plan.time == INT64_MAX) return "w4a16_wgmma: more slices than steps";
    const Params& p = plan.params;
    const int clusters = concurrent_clusters<T, C>(p.slices, device);
    return launch(
        {reinterpret_cast<const void*>(w4a16_wgmma_kernel<T, C>), p.slices * (p.tiles < clusters ? p.tiles : clusters),
         C::kThreads, C::kSharedBytes, p.slices > 1 ? p.slices : 0},
        p, problem, device, stream);
}

template <int kGroups>
using Wgmma32 = Config<kGroups, 32, 7, 1>;
template <int kGroups>
using Wgmma64 = Config<kGroups, 64, 5, 2>;
template <int kGroups>
using Wgmma96 = Config<kGroups, 96, 5, 2>;
template <int kGroups>
using Wgmma128 = Config<kGroups, 128, 4, 2>;

// The tile of 64, 96 or 128 tokens that is estimated to take the least time. A larger tile reads and dequantizes the
// weights less often, so that a smaller one must be faster by more than the estimates tell apart.
template <typename T, int kGroups>
const char* run_fastest(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    const Plan of_64 = make_plan<T, Wgmma64<kGroups>>(problem, device);
    const Plan of_96 = make_plan<T, Wgmma96<kGroups>>(problem, device);
    const Plan of_128 = make_plan<T, Wgmma128<kGroups>>(problem, device);
    const auto faster = [](const Plan& a, const Plan& b) { return a.time + a.time / 32 < b.time; };
    if (faster(of_64, of_96) && faster(of_64, of_128)) {
        return run<T, Wgmma64<kGroups>>(of_64, problem, device, stream);
    }
    if (faster(of_96, of_128)) return run<T, Wgmma96<kGroups>>(of_96, problem, device, stream);
    return run<T, Wgmma128<kGroups>>(of_128, problem, device, stream);
}

template <typename T, typename C>
const char* run(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    return run<T, C>(make_plan<T, C>(problem, device), problem, device, stream);
}

struct Wgmma {
    template <typename T, int kGroups>
    static const char* run(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
        switch (problem.kernel) {
            case W4A16Kernel::kWgmma32:
                return w4a16::run<T, Wgmma32<kGroups>>(problem, device, stream);
            case W4A16Kernel::kWgmma64:
                return w4a16::run<T, Wgmma64<kGroups>>(problem, device, stream);
            case W4A16Kernel::kWgmma96:
                return w4a16::run<T, Wgmma96<kGroups>>(problem, device, stream);
            case W4A16Kernel::kWgmma128:
                return w4a16::run<T, Wgmma128<kGroups>>(problem, device, stream);
            case W4A16Kernel::kWgmma:
                return run_fastest<T, kGroups>(problem, device, stream);
            default:
                return "w4a16_wgmma: not a kernel of this file";
        }
    }
};

}  // namespace
}  // namespace vllm_sparse::w4a16

namespace vllm_sparse {

const char* w4a16_wgmma(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    return w4a16::dispatch<w4a16::Wgmma>(problem, device, stream);
}

}  // namespace vllm_sparse
