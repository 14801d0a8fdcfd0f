// The root-mean-square norm between two layers, with the residual stream added first (Zhang and Sennrich, "Root Mean
// Square Layer Normalization", arXiv 1910.07467): residual_out = x + residual, out = residual_out / rms * weight in the
// arithmetic of vLLM's own op. No torch here.
#pragma once

namespace vllm_sparse::norm {

struct AddNormArguments {
    const void* x;         // bfloat16, or float16 if half: [m, k], contiguous, 16-byte aligned, as all the others
    const void* residual;  // [m, k]
    const void* weight;    // [k]
    void* residual_out;    // [m, k]
    void* out;             // [m, k], or nullptr for codes
    void* codes;           // e4m3 [m, k] of what out would be, as fp8::quantize makes them, or nullptr
    float* scale;          // [m], of the codes
    bool half;
    float epsilon;
    int m, k;  // k % 8 == 0, k <= 131072
    int device;
    bool overlap;  // may start while its predecessor in the stream still runs (programmatic dependent launch)
};

// Launches on `stream` (a cudaStream_t) of `device`; the caller's device stays current. With few tokens the next kernel
// may start at once. Returns nullptr, or one sentence that says what failed.
const char* add_norm(const AddNormArguments& arguments, void* stream);

}  // namespace vllm_sparse::norm
