// Which W4A16 kernel runs, as data.
#include <climits>

#include "device_guard.h"
#include "w4a16_common.cuh"

namespace vllm_sparse {
namespace {

struct Choice {
    int most_tokens;
    W4A16Kernel kernel;
};

// Measured on an H200 (docs/kernels-w4a16.md): the smallest tile that holds all tokens, since padding costs tensor time
// and shared memory.
constexpr Choice kHopper[] = {{8, W4A16Kernel::kStream8},
                              {16, W4A16Kernel::kStream16},
                              {32, W4A16Kernel::kWgmma32},
                              {64, W4A16Kernel::kWgmma64},
                              {INT_MAX, W4A16Kernel::kWgmma}};

// Everywhere else mma.sp; 64 tokens are the most whose sums fit the registers.
constexpr Choice kPortable[] = {
    {8, W4A16Kernel::kMma8}, {16, W4A16Kernel::kMma16}, {32, W4A16Kernel::kMma32}, {INT_MAX, W4A16Kernel::kMma64}};

template <int kRows>
W4A16Kernel choose(const Choice (&table)[kRows], int tokens) {
    for (const Choice& choice : table) {
        if (tokens <= choice.most_tokens) return choice.kernel;
    }
    return table[kRows - 1].kernel;
}

}  // namespace

size_t w4a16_workspace_bytes(int sm_count) { return kW4A16CounterBytes + 2 * sm_count * w4a16::kPartBytes; }

const char* w4a16_linear(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream) {
    if (problem.m == 0) return nullptr;
    if (problem.m < 0 || problem.n <= 0 || problem.k <= 0 || problem.n % kW4A16RowBlock != 0 || problem.k % 32 != 0) {
        return "w4a16: n must be a multiple of 16 and k of 32";
    }
    if (device.sm_count > 1024) return "w4a16: more than 1024 multiprocessors";
    const DeviceGuard guard(device.index);
    if (guard.error != nullptr) return guard.error;
    W4A16Problem chosen = problem;
    if (chosen.kernel == W4A16Kernel::kAuto) {
        chosen.kernel = device.capability == 90 ? choose(kHopper, problem.m) : choose(kPortable, problem.m);
    }
    if (chosen.kernel >= W4A16Kernel::kWgmma32) return w4a16_wgmma(chosen, device, stream);
    if (chosen.kernel >= W4A16Kernel::kStream8) return w4a16_stream(chosen, device, stream);
    if (problem.workspace == nullptr) return "w4a16: the kernels for any GPU need a workspace";
    return w4a16_mma(chosen, device, stream);
}

}  // namespace vllm_sparse
