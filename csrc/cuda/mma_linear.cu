// Which instance of the mma.sp kernel runs, and its launch.
#include "device_guard.h"
#include "launch.h"
#include "mma_linear.cuh"

namespace vllm_sparse::mma {
namespace {

// Tokens of a tile by its index.
constexpr int kTileTokens[] = {8, 16, 32, 64};
constexpr int kMostBlocksPerSm = 2;

int round_up_divide(int a, int b) { return (a + b - 1) / b; }

// Divides the work into at most *blocks shares, and says into how many.
template <typename C>
Params make_params(const LinearProblem& problem, int* blocks) {
    using O = typename C::O;
    Params p;
    p.weight = static_cast<const uint8_t*>(problem.weight);
    p.x = static_cast<const uint8_t*>(problem.x);
    p.x_scale = problem.x_scale;
    p.x_zero = problem.x_zero;
    p.channel_scale = problem.channel_scale;
    p.weight_sum = problem.weight_sum;
    p.bias = static_cast<const uint16_t*>(problem.bias);
    p.y = static_cast<uint16_t*>(problem.y);
    p.counters = static_cast<int*>(problem.workspace);
    p.partials = reinterpret_cast<uint4*>(static_cast<char*>(problem.workspace) + kCounterBytes);
    p.m = problem.m, p.n = problem.n, p.k = problem.k;
    p.x_scale_stride = problem.x_scale_per_token;
    p.bf16_out = problem.y_type == Number::kBf16;
    p.groups = problem.group_size == -1 ? 0 : O::kStepColumns / problem.group_size;
    p.block_bytes = O::kBlockBytes + 2 * kRowBlock * p.groups;
    p.steps = round_up_divide(problem.k, kStepsMultiple<O> * O::kStepColumns) * kStepsMultiple<O> / C::kSteps;
    p.token_tiles = round_up_divide(problem.m, C::kTokens);
    const int steps = round_up_divide(problem.n, kTileRows) * p.token_tiles * p.steps;
    *blocks = steps < *blocks ? steps : *blocks;
    p.share = steps / *blocks;
    p.longer = steps % *blocks;
    return p;
}

template <typename C>
const char* launch(const LinearProblem& problem, const LinearDevice& device, int blocks, cudaStream_t stream) {
    Params p = make_params<C>(problem, &blocks);
    const void* kernel = reinterpret_cast<const void*>(mma_linear_kernel<C>);
    if (const char* error = allow_shared(kernel, C::kBytes)) return error;
    void* arguments[] = {&p};
    return vllm_sparse::launch({kernel, blocks, C::kThreads, C::kBytes, 0, device.overlap, stream}, arguments);
}

template <typename W, typename X>
const char* run(const LinearProblem& problem, const LinearDevice& device, int tile, int blocks, cudaStream_t stream) {
    using O = Operands<W, X>;
    // Few tokens make short steps: two of them per stage.
    constexpr int kSteps = O::kWiden ? 1 : 2;
    switch (tile) {
        case 0:
            return launch<Config<O, 1, 1, 1, 8, kSteps>>(problem, device, blocks, stream);
        case 1:
            return launch<Config<O, 1, 2, 1, 8, kSteps>>(problem, device, blocks, stream);
        case 2:
            return launch<Config<O, 2, 2, 2, 8, 1>>(problem, device, blocks, stream);
        default:
            // Widening keeps two sets of sums, so that a warp has room for half as many.
            return launch<Config<O, O::kWiden ? 2 : 4, 4, 2, O::kWiden ? 8 : 4, 1>>(problem, device, blocks, stream);
    }
}

const char* run(const LinearProblem& problem, const LinearDevice& device, int tile, int blocks, cudaStream_t stream) {
    const auto is = [&](Number weight, Number x) { return problem.weight_type == weight && problem.x_type == x; };
    const auto with = [&](auto weight, auto x) {
        return run<decltype(weight), decltype(x)>(problem, device, tile, blocks, stream);
    };
    if (is(Number::kBf16, Number::kBf16)) return with(__nv_bfloat16(), __nv_bfloat16());
    if (is(Number::kFp16, Number::kFp16)) return with(__half(), __half());
    if (is(Number::kInt8, Number::kInt8)) return with(int8_t(), int8_t());
    if (is(Number::kInt8, Number::kBf16)) return with(int8_t(), __nv_bfloat16());
    if (is(Number::kInt8, Number::kFp16)) return with(int8_t(), __half());
    if (is(Number::kFp8, Number::kBf16)) return with(__nv_fp8_e4m3(), __nv_bfloat16());
    if (is(Number::kFp8, Number::kFp16)) return with(__nv_fp8_e4m3(), __half());
    if (is(Number::kFp8, Number::kFp8)) {
        if (device.capability < 89) return "FP8 activations need compute capability 8.9";
        return with(__nv_fp8_e4m3(), __nv_fp8_e4m3());
    }
    return "these weights do not multiply these activations";
}

// The smallest tile that holds all tokens: padding costs time and shared memory. 128 tokens were never faster than 64
// (docs/decisions/0071).
int choose_tile(const LinearProblem& problem, const LinearDevice& device) {
    const bool emulated = problem.x_type == Number::kFp8 && emulates_fp8(device.capability);
    const int most = emulated ? kMostEmulatedTokens : 64;
    int tile = 0;
    while (kTileTokens[tile] < most && kTileTokens[tile] < problem.m) ++tile;
    return tile;
}

// Measured on an H200. One block keeps the memory busy where nothing is computed, and leaves room for the next
// kernel's. Two hide each other's latencies where there is more to do, if the shared memory holds them and, widening 64
// tokens, the registers.
//
// With few tokens two blocks win as well where their shares begin with tiles: where each has one tile or, at the cost
// of at most a thirtieth of them, all tiles are cut into the same parts.
int choose_blocks(const LinearProblem& problem, const LinearDevice& device, int tile) {
    const int most = device.sm_count * kMostBlocksPerSm;
    const bool large_memory = device.capability == 90 || device.capability == 100;
    const bool widen = problem.weight_type != problem.x_type;
    const bool pays = widen ? kTileTokens[tile] <= 32 : kTileTokens[tile] >= 32;
    if (!large_memory) return device.sm_count;
    if (pays) return most;
    const int tiles = round_up_divide(problem.n, kTileRows) * round_up_divide(problem.m, kTileTokens[tile]);
    const int whole = most / tiles * tiles;
    const bool equal = whole == tiles ? 5 * whole >= 4 * most : 30 * whole >= 29 * most;
    const bool emulated = problem.x_type == Number::kFp8 && emulates_fp8(device.capability);
    return !widen && !emulated && equal ? whole : device.sm_count;
}

}  // namespace

size_t workspace_bytes(int sm_count) {
    constexpr size_t kPartsPerBlock = 2, kLargestTile = kTileRows * 64 * sizeof(float);
    return kCounterBytes + sm_count * kMostBlocksPerSm * kPartsPerBlock * kLargestTile;
}

const char* linear(const LinearProblem& problem, const LinearDevice& device, cudaStream_t stream) {
    if (problem.m == 0) return nullptr;
    if (problem.m < 0 || problem.n <= 0 || problem.k <= 0 || problem.n % kRowBlock != 0 || problem.k % 32 != 0) {
        return "n must be a multiple of 16 and k of 32";
    }
    if (device.capability < 80) return "needs compute capability 8.0";
    if (device.sm_count * kMostBlocksPerSm > kCounterBytes / static_cast<int>(sizeof(int))) {
        return "more than 512 multiprocessors";
    }
    const DeviceGuard guard(device.index);
    if (guard.error != nullptr) return guard.error;
    const int tile = problem.tile < 0 ? choose_tile(problem, device) : problem.tile;
    const int blocks =
        problem.blocks_per_sm > 0 ? problem.blocks_per_sm * device.sm_count : choose_blocks(problem, device, tile);
    return run(problem, device, tile, blocks, stream);
}

}  // namespace vllm_sparse::mma
