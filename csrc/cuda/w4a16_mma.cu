// W4A16 2:4 sparse linear, mma.sp on any NVIDIA GPU since Ampere: weights are the sparse operand (16 output rows),
// tokens the dense one (8 columns). Made for few tokens, where the time is that of reading the weights once: whole
// steps of weights travel as one bulk copy each (sm_90 and later) or as cp.async (before), several of them in flight.
#include "w4a16_common.cuh"

namespace vllm_sparse::w4a16 {
namespace {

template <int kGroups_, int kI_, int kJ_, int kWarps_>
struct Config {
    static constexpr int kGroups = kGroups_;  // scales per row and step; 0: one scale per channel, applied at the end
    static constexpr int kI = kI_;            // row blocks per warp
    static constexpr int kJ = kJ_;            // tiles of 8 tokens
    static constexpr int kWarps = kWarps_;    // consumer warps
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kBlocks = kWarps * kI;
    static constexpr int kTokens = 8 * kJ;
    static constexpr int kTokenBytes = 2 * kTokens * kStep;  // two halves of 64 columns, rows of 128 swizzled bytes
    static constexpr int kWeightBytes = kBlocks * kBlockBytes<kGroups>;
    // 96 KiB leave room for the next kernel's block beside this one, and fit the smallest shared memory (99 KiB).
    static constexpr int kFit = 96 * 1024 / (kTokenBytes + kWeightBytes);
    static constexpr int kStages = kFit < 12 ? kFit : 12;
    using Memory = Shared<kTokenBytes, kWeightBytes, kStages>;
    using Work = StreamK<kBlocks, kTokens>;
    static_assert(kStages >= 2);
};

template <typename T, int kSelector>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t positions) {
#define VLLM_SPARSE_MMA(type)                                                                               \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type                \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),  \
                   "r"(positions), "n"(kSelector))
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        VLLM_SPARSE_MMA("bf16");
    } else {
        VLLM_SPARSE_MMA("f16");
    }
#undef VLLM_SPARSE_MMA
}

// acc += weights of one step * tokens. `units`: how many of the step's four 32-column units lie inside k.
template <typename T, typename C>
__device__ __forceinline__ void multiply_step(float (&acc)[C::kI][C::kJ][4], const char* weights, uint32_t tokens,
                                              int units) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int kUnitsPerGroup = C::kGroups == 0 ? kUnits : kUnits / C::kGroups;
    const uint32_t token_row = tokens + lane % 8 * 128;
    uint4 codes[C::kI];
    uint2 positions[C::kI];
#pragma unroll
    for (int i = 0; i < C::kI; ++i) {
        const char* block = weights + (warp * C::kI + i) * kBlockBytes<C::kGroups>;
        codes[i] = reinterpret_cast<const uint4*>(block)[lane];
        positions[i] = reinterpret_cast<const uint2*>(block + kCodeBytes)[lane];
    }
#pragma unroll
    for (int group = 0; group < kUnits / kUnitsPerGroup; ++group) {
        float part[C::kI][C::kJ][4] = {};
#pragma unroll
        for (int unit = group * kUnitsPerGroup; unit < (group + 1) * kUnitsPerGroup; ++unit) {
            if (unit >= units) break;
            uint32_t b[C::kJ][4];
#pragma unroll
            for (int j = 0; j < C::kJ; ++j) {
                const int piece =
                    (unit % 2 * 4 + lane / 8) ^ lane % 8;  // 16-byte pieces, as the copy engine swizzles them
                load_tokens(b[j], token_row + unit / 2 * (C::kTokenBytes / 2) + 8 * j * 128 + piece * 16);
            }
#pragma unroll
            for (int i = 0; i < C::kI; ++i) {
                const uint32_t words[4] = {codes[i].x, codes[i].y, codes[i].z, codes[i].w};
                const uint32_t position = unit < 2 ? positions[i].x : positions[i].y;
                uint32_t a[4];
                decode(words[unit], a, T());
#pragma unroll
                for (int j = 0; j < C::kJ; ++j) {
                    float (&d)[4] = C::kGroups == 0 ? acc[i][j] : part[i][j];
                    if (unit % 2 == 0) {
                        mma<T, 0>(d, a, b[j], position);
                    } else {
                        mma<T, 1>(d, a, b[j], position);
                    }
                }
            }
        }
        if constexpr (C::kGroups > 0) {
#pragma unroll
            for (int i = 0; i < C::kI; ++i) {
                const char* scales =
                    weights + (warp * C::kI + i) * kBlockBytes<C::kGroups> + kCodeBytes + kPositionBytes;
                const float2 scale =
                    unpack(reinterpret_cast<const uint32_t*>(scales)[lane / 4 * C::kGroups + group], T());
#pragma unroll
                for (int j = 0; j < C::kJ; ++j) {
                    acc[i][j][0] += scale.x * part[i][j][0], acc[i][j][1] += scale.x * part[i][j][1];
                    acc[i][j][2] += scale.y * part[i][j][2], acc[i][j][3] += scale.y * part[i][j][3];
                }
            }
        }
    }
}

// Run the block's work. `ready(i, stage)` waits until the block's i-th step is in its stage, `release` gives the stage
// back.
template <typename T, typename C, typename Ready, typename Release>
__device__ __forceinline__ void consume(const Params& p, char* shared, Ready ready, Release release) {
    float acc[C::kI][C::kJ][4];
    int index = 0, stage = 0;
    for (typename C::Work work(p); work.valid(p); work.next(p)) {
#pragma unroll
        for (int i = 0; i < C::kI; ++i) {
#pragma unroll
            for (int j = 0; j < C::kJ; ++j) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.f;
        }
        for (int step = work.begin; step < work.end; ++step, ++index) {
            ready(index, stage);
            const char* weights = shared + C::Memory::kWeights + stage * C::kWeightBytes;
            multiply_step<T, C>(acc, weights, shared_address(shared + stage * C::kTokenBytes),
                                (p.k - step * kStep) / 32);
            release(index, stage);
            stage = stage + 1 == C::kStages ? 0 : stage + 1;
        }
        const Rows rows{static_cast<int>(threadIdx.x) / 32 * C::kI, 1};
        finish_tile<T, C::kThreads>(p, acc, work.tile, work.begin, work.end, work.place(p), rows, threadIdx.x,
                                    reinterpret_cast<int*>(shared + C::Memory::kLast));
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Blocks for which a multiprocessor's registers must suffice, 0: as ptxas likes, which then spills a few bytes of some
// functions to make room for one more. 12.x has shared memory for one block, 10.0 for two.
template <typename C>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kLeastBlocks = 1;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kLeastBlocks = C::kI * C::kJ <= 4 ? 2 : 0;
#else
constexpr int kLeastBlocks = C::kI * C::kJ >= 4 ? 1 : 0;
#endif

template <typename T, typename C>
__global__ __launch_bounds__(C::kThreads + 32 * kProducers,
                             kLeastBlocks<C>) void w4a16_mma_kernel(const __grid_constant__ Params p,
                                                                    const __grid_constant__ CUtensorMap token_map) {
    extern __shared__ char unaligned[];
    char* shared = align_shared(unaligned);
    using S = typename C::Memory;
    const uint32_t address = shared_address(shared);
    ptx::launch_dependents();
    if (threadIdx.x == C::kThreads) init_barriers<S>(address, C::kThreads);  // every lane gives stages back
    __syncthreads();
    if (threadIdx.x >= C::kThreads) {
        if (threadIdx.x % 32 == 0) {
            produce<S, typename C::Work, C::kGroups>(p, &token_map, address, (threadIdx.x - C::kThreads) / 32, [] {});
        }
        return;
    }
    uint32_t parity = 0;
    consume<T, C>(
        p, shared, [&](int, int stage) { ptx::barrier_wait(address + S::kFull + 8 * stage, parity); },
        [&](int, int stage) {
            ptx::barrier_arrive(address + S::kEmpty + 8 * stage);
            if (stage + 1 == C::kStages) parity ^= 1;
        });
}
#else
__device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

template <typename T, typename C>
__global__ __launch_bounds__(C::kThreads, 1) void w4a16_mma_kernel(const __grid_constant__ Params p,
                                                                   const __grid_constant__ CUtensorMap) {
    extern __shared__ char unaligned[];
    char* shared = align_shared(unaligned);
    const uint32_t address = shared_address(shared);
    typename C::Work work(p);
    Place place = work.place(p);
    Walk<C::kGroups> walk(p, place.block, place.blocks, work.begin);
    int step = work.begin;
    const auto fetch = [&](int stage) {
        if (work.valid(p)) {
            const uint32_t weights = address + C::Memory::kWeights + stage * C::kWeightBytes;
            for (int i = 16 * threadIdx.x; i < walk.bytes; i += 16 * C::kThreads) copy_16(weights + i, walk.weight + i);
            const int pieces = min(kStep, p.k - step * kStep) / 8, tokens = min(C::kTokens, p.m - place.token);
            for (int i = threadIdx.x; i < tokens * (kStep / 8); i += C::kThreads) {
                const int token = i / (kStep / 8), piece = i % (kStep / 8);
                const uint32_t to = piece / 8 * (C::kTokenBytes / 2) + token * 128 + ((piece ^ token) % 8) * 16;
                const uint8_t* from =
                    p.x + 2 * (static_cast<int64_t>(place.token + token) * p.k + step * kStep + 8 * piece);
                if (piece < pieces) copy_16(address + stage * C::kTokenBytes + to, from);
            }
            walk.weight += walk.stride;
            if (++step == work.end) {
                work.next(p);
                place = work.place(p);
                step = work.begin;
                walk = {p, place.block, place.blocks, work.begin};
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    for (int i = 0; i < C::kStages - 1; ++i) fetch(i);
    consume<T, C>(
        p, shared,
        [&](int, int stage) {
            asm volatile("cp.async.wait_group %0;" ::"n"(C::kStages - 2) : "memory");
            __syncthreads();
            fetch(stage == 0 ? C::kStages - 1 : stage - 1);
        },
        [](int, int) {});
}
#endif

template <typename T, typename C>
const char* run(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    Params p = make_params(problem, C::kBlocks * kRowBlock, C::kTokens);
    const int64_t steps = static_cast<int64_t>(p.tiles) * p.steps;
    Launch how;
    how.kernel = reinterpret_cast<const void*>(w4a16_mma_kernel<T, C>);
    how.threads = C::kThreads + (device.capability >= 90 ? 32 * kProducers : 0);
    how.shared_bytes = C::Memory::kBytes;
    how.blocks = static_cast<int>(steps < device.sm_count ? steps : device.sm_count);
    divide(p, p.tiles * p.steps, how.blocks);
    return launch(how, p, problem, device, stream);
}

struct Mma {
    template <typename T, int kGroups>
    static const char* run(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
        switch (problem.kernel) {
            case W4A16Kernel::kMma8:
                return w4a16::run<T, Config<kGroups, 1, 1, 8>>(problem, device, stream);
            case W4A16Kernel::kMma16:
                return w4a16::run<T, Config<kGroups, 2, 2, 8>>(problem, device, stream);
            case W4A16Kernel::kMma32:
                return w4a16::run<T, Config<kGroups, 2, 4, 8>>(problem, device, stream);
            case W4A16Kernel::kMma64:
                // With four groups a step, twice the row blocks per warp do not fit the registers.
                return w4a16::run<T, Config<kGroups, kGroups == 4 ? 1 : 2, 8, kGroups == 4 ? 8 : 4>>(problem, device,
                                                                                                     stream);
            default:
                return "w4a16_mma: not a kernel of this file";
        }
    }
};

}  // namespace
}  // namespace vllm_sparse::w4a16

namespace vllm_sparse {

const char* w4a16_mma(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    return w4a16::dispatch<w4a16::Mma>(problem, device, stream);
}

}  // namespace vllm_sparse
