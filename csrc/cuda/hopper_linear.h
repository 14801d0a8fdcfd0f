// Linear layers with a 2:4 sparse weight on Hopper: out[m, n] = x[m, k] @ W[n, k]^T, for 8-bit elements times x_scale
// and weight_scale, + bias. No torch here: device pointers, sizes and a stream. Every function returns nullptr, or one
// sentence that says what failed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vllm_sparse::hopper {

// What x and the weight's values are.
enum class Element { kE4m3, kInt8, kBFloat16, kFloat16 };
constexpr int kElements = 4;

constexpr int element_bytes(Element element) { return element == Element::kE4m3 || element == Element::kInt8 ? 1 : 2; }

// The weight is stored in bricks of 64 features x 128 bytes of x (128 columns of 8 bits, 64 of 16), ordered
// [feature tile][column tile]:
//   4096 bytes of kept values: [2 steps of 64 bytes of x][8 feature groups][2 chunks][8 features][16 bytes]
//   the positions, one nibble per group of 4 columns, in 32-bit words:
//     8 bits:  [128 threads][2 steps]; thread t holds feature 16*(t/32) + 8*(t%2) + (t%32)/4 and columns
//              32*((t/2)%2) .. +31 of the step.
//     16 bits: [128 threads]; thread t holds in its low half feature 16*(t/32) + (t%32)/4, in its high half the feature
//              8 further, and of both columns 16*(t%2) .. +15 of step (t/2)%2.
// Features are padded to 64 and columns to two bricks (values 0, nibbles 0b0100).
constexpr int kBrickFeatures = 64;
constexpr int kBrickRowBytes = 128;
constexpr int kBrickValueBytes = 4096;
constexpr int kPaddingBricks = 2;

constexpr int brick_bytes(int element_bytes) { return kBrickValueBytes + 1024 / element_bytes; }

struct LinearArguments {
    Element element;
    const void* x;  // [m, k], rows `x_stride` bytes apart (multiple of 16), 16-byte aligned
    int64_t x_stride;
    const float* x_scale;  // 8 bits: [m], or [1] if x_scale_per_token is false
    const int* x_zero;     // int8: as many zero points, or nullptr: there are none
    bool x_scale_per_token;
    const void* weight;         // bricks, 128-byte aligned
    const float* weight_scale;  // 8 bits: [n rounded up to 64]
    const int* weight_sum;      // [n], each feature's codes added up; nullptr where x_zero is
    const void* bias;           // [n] in the output's type, or nullptr
    void* out;                  // [m, n], contiguous, 16-byte aligned: x's type if that has 16 bits, else
    bool half_out;              // float16 or bfloat16
    int m, n, k;                // n % 16 == 0, rows of x are multiples of 32 bytes
    int device;
    void* scratch;  // scratch_bytes() of any content that nothing else uses meanwhile, 16-byte aligned
};

// Number of entries of an element's configuration table.
int configuration_count(Element element);

// The configuration that `linear` uses for these sizes on a device of so many multiprocessors.
int choose_configuration(Element element, int m, int n, int k, int multiprocessors);

// Tokens of the tile of one entry; every entry runs any number of tokens.
int configuration_tokens(Element element, int configuration);

// Scratch memory that one call needs, in bytes, often none; `configuration` as for `linear`.
int64_t scratch_bytes(Element element, int m, int n, int k, int multiprocessors, int configuration);

// Launches on `stream` (a cudaStream_t) of `device`; no synchronisation, no allocation, the caller's device stays
// current. `configuration` -1 chooses; `programmatic` lets the kernel start while its predecessor in the stream still
// runs.
const char* linear(const LinearArguments& arguments, int configuration, bool programmatic, void* stream);

}  // namespace vllm_sparse::hopper
