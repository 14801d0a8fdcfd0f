// FP8 (e4m3) linear layer with a 2:4 sparse weight on Hopper: out[m, n] = (x[m, k] @ W[n, k]^T) * x_scale *
// weight_scale + bias. No torch here: device pointers, sizes and a stream. Every function returns nullptr, or one
// sentence that says what failed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vllm_sparse::fp8 {

// The weight is stored in bricks of 64 features x 128 columns, 5120 bytes each, ordered [feature tile][column tile]:
//   4096 bytes of kept values: [2 steps of 64 columns][8 feature groups][2 chunks][8 features][16 bytes]
//   1024 bytes of positions:   [128 threads][2 steps] 32-bit words, each the nibbles of 8 groups of 4 columns; thread t
//   holds
//                              feature 16*(t/32) + 8*(t%2) + (t%32)/4 and columns 32*((t/2)%2) .. +31 of the step.
// Features are padded to 64 and columns to 256 (values 0, nibbles 0b0100).
constexpr int kBrickFeatures = 64;
constexpr int kBrickColumns = 128;
constexpr int kBrickBytes = 5120;
constexpr int kColumnPadding = 256;

struct LinearArguments {
    const void* x;  // e4m3 [m, k], rows `x_stride` bytes apart (multiple of 16), 16-byte aligned
    int64_t x_stride;
    const float* x_scale;  // [m], or [1] if x_scale_per_token is false
    bool x_scale_per_token;
    const void* weight;         // bricks, 128-byte aligned
    const float* weight_scale;  // [n rounded up to 64]
    const void* bias;           // [n] in the output's type, or nullptr
    void* out;                  // [m, n] bfloat16, or float16 if half_out; contiguous, 16-byte aligned
    bool half_out;
    int m, n, k;  // n % 16 == 0, k % 32 == 0
    int device;
};

// Number of entries of the configuration table.
int configuration_count();

// The configuration that `linear` uses for these sizes on a device of so many multiprocessors.
int choose_configuration(int m, int n, int k, int multiprocessors);

// Tokens of the tile of one entry; every entry runs any number of tokens.
int configuration_tokens(int configuration);

// Launches on `stream` (a cudaStream_t) of `device`; no synchronisation, no allocation, the caller's device stays
// current. `configuration` -1 chooses; `programmatic` lets the kernel start while its predecessor in the stream still
// runs.
const char* linear(const LinearArguments& arguments, int configuration, bool programmatic, void* stream);

}  // namespace vllm_sparse::fp8
