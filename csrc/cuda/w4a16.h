// W4A16 2:4 sparse linear layers: y[m, n] = x[m, k] * W[n, k]^T (+ bias), W in the packed form of
// docs/kernels-w4a16.md. No torch here: raw device pointers, sizes and a stream. Every function returns nullptr, or one
// sentence saying what failed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace vllm_sparse {

// Original columns of one packed step, rows of one packed panel, rows of one row block.
constexpr int kW4A16Step = 128;
constexpr int kW4A16Panel = 256;
constexpr int kW4A16RowBlock = 16;

enum class W4A16Kernel : int {
    kAuto = -1,     // by the sizes and the device
    kMma8 = 0,      // mma.sp, 128 rows x 8 tokens
    kMma16 = 1,     // mma.sp, 256 rows x 16 tokens
    kMma32 = 2,     // mma.sp, 256 rows x 32 tokens
    kMma64 = 3,     // mma.sp, 128 rows x 64 tokens
    kStream8 = 4,   // mma.sp (sm_90a), 256 rows x 8 tokens, the next kernel's block beside this one's
    kStream16 = 5,  // 16 tokens
    kWgmma32 = 6,   // wgmma.sp (sm_90a), up to 256 rows x 32 tokens
    kWgmma64 = 7,
    kWgmma96 = 8,
    kWgmma128 = 9,
    kWgmma = 10,  // the one of 64, 96 and 128 tokens that is estimated to be fastest
};

// What the 16 rows of a packed row block are, and what y holds of them.
enum class W4A16Output : int {
    kRows = 0,    // 16 consecutive features: y [m, n]
    kHalves = 1,  // 8 of the first n / 2 features and the 8 at the same places of the others: y [m, n]
    kGated = 2,   // as kHalves; y [m, n / 2] = silu(first) * second, the end of a gated MLP's first layer
};

struct W4A16Problem {
    const void* x;               // [m, k] activations, row-major, contiguous, 16-byte aligned
    const void* weight;          // packed codes, positions and group scales
    const float* channel_scale;  // [n], or nullptr: group scales travel inside `weight`
    const void* bias;            // [n] in the activations' type, or nullptr
    void* y;                     // [m, n], or [m, n / 2] if gated, in the activations' type
    void* workspace;             // w4a16_workspace_bytes() bytes, of the kernels for any GPU alone
    int m, n, k;                 // n % 16 == 0, k % 32 == 0
    int group_size;              // 32, 64, 128, or -1 with channel_scale
    bool bf16;                   // activations and scales are bfloat16, else float16
    W4A16Output output = W4A16Output::kRows;
    W4A16Kernel kernel = W4A16Kernel::kAuto;
    int slices = 0;  // Hopper: blocks that share a tile's columns, 1 ... 8 (few tokens: 1, 2, 4); 0: by the sizes
};

struct W4A16Device {
    int index;
    int sm_count;
    int capability;  // 10 * major + minor
    bool overlap;    // programmatic dependent launch (capability 90 and later)
};

// Bytes of workspace that calls which may run at the same time must not share. Before the first call the first
// kW4A16CounterBytes must be 0; every call leaves them so.
constexpr int kW4A16CounterBytes = 4096;
size_t w4a16_workspace_bytes(int sm_count);

const char* w4a16_linear(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream);

// The three families behind it; problem.kernel must name one of theirs.
const char* w4a16_mma(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream);
const char* w4a16_wgmma(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream);
const char* w4a16_stream(const W4A16Problem& problem, const W4A16Device& device, cudaStream_t stream);

}  // namespace vllm_sparse
