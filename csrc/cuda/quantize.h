// Dynamic e4m3 quantization of activations, one scale per token: scale = max(|x|) / 448, at least 1 / (448 * 512),
// codes = x * (1 / scale), which is what vLLM's own op computes. No torch here.
#pragma once

#include <cstdint>

namespace vllm_sparse::fp8 {

struct QuantizeArguments {
    const void* x;  // bfloat16, or float16 if half: [m, k], contiguous, 16-byte aligned
    bool half;
    bool gated;    // x is [m, 2 k], gate beside up, and what is quantized is silu(gate) * up
    void* codes;   // e4m3 [m, k], 8-byte aligned
    float* scale;  // [m]
    int m, k;      // k % 8 == 0, k <= 131072
    int device;
    bool overlap;  // may start while its predecessor in the stream still runs (programmatic dependent launch)
};

// Launches on `stream` (a cudaStream_t) of `device`; the caller's device stays current. With few tokens the next kernel
// may start at once. Returns nullptr, or one sentence that says what failed.
const char* quantize(const QuantizeArguments& arguments, void* stream);

}  // namespace vllm_sparse::fp8
