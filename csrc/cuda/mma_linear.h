// 2:4 sparse linear layers by mma.sp, for every GPU since Ampere: y[m, n] = x[m, k] * W[n, k]^T (+ bias), W in the
// packed form of docs/kernels-mma.md. No torch here: raw device pointers, sizes and a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace vllm_sparse::mma {

// What a number is stored as.
enum class Number : int { kBf16 = 0, kFp16 = 1, kInt8 = 2, kFp8 = 3 };

// Output features of a packed tile; rows are padded to it.
constexpr int kTileRows = 128;
// Bytes of one workspace's counters, at its beginning.
constexpr int kCounterBytes = 4096;

struct LinearProblem {
    const void* x;         // [m, k], row-major, contiguous, 16-byte aligned
    const float* x_scale;  // [m] or [1], or nullptr: x is not quantized
    const int* x_zero;     // as many zero points of 8-bit integers, or nullptr: there are none
    bool x_scale_per_token;
    const void* weight;          // packed values, positions and group scales, 16-byte aligned
    const float* channel_scale;  // [n], or nullptr: none, or group scales inside `weight`
    const int* weight_sum;       // [n], each channel's codes added up; nullptr where x_zero is
    const void* bias;            // [n] in the output's type, or nullptr
    void* y;                     // [m, n]
    void* workspace;             // workspace_bytes(), zero before the first call
    int m, n, k;                 // n % 16 == 0, k % 32 == 0
    int group_size;              // 32, 64 or 128 (8-bit weights with 16-bit x alone), or -1
    Number weight_type, x_type;  // the same, or 8-bit integers or FP8 with bf16 or fp16
    Number y_type;               // kBf16 or kFp16; that of a 16-bit x
    int tile = -1;               // index into the tile sizes 8, 16, 32, 64 tokens; -1: by the sizes
    int blocks_per_sm = 0;       // 0: by the device
};

struct LinearDevice {
    int index;
    int sm_count;
    int capability;  // 10 * major + minor
    bool overlap;    // programmatic dependent launch (capability 90 and later)
};

// Bytes of workspace that calls which may run at the same time must not share.
size_t workspace_bytes(int sm_count);

// Returns nullptr, or one sentence saying what failed.
const char* linear(const LinearProblem& problem, const LinearDevice& device, cudaStream_t stream);

}  // namespace vllm_sparse::mma
