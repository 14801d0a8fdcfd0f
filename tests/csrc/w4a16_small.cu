// Launches every W4A16 configuration of one family in small, for compute-sanitizer, which is too slow for Python.
//
//     nvcc -O1 -std=c++17 -Icsrc/cuda tests/csrc/w4a16_small.cu LIBRARY.a -cudart static -o small
//     compute-sanitizer --tool racecheck ./small wgmma      # or memcheck, synccheck; stream, mma
//
// LIBRARY.a is vllm_sparse_cuda of the build. Eight multiprocessors make tiles of all heights and let stages come
// round.
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "w4a16.h"

using namespace vllm_sparse;

namespace {

constexpr int kMultiprocessors = 8, kCapability = 90;
constexpr size_t kBytes = 64 << 20;

struct Family {
    const char* name;
    int first, last;  // of W4A16Kernel
    int k;
};
constexpr Family kFamilies[] = {{"mma", 0, 3, 1408}, {"stream", 4, 5, 2944}, {"wgmma", 6, 9, 1408}};
constexpr int kTokens[] = {8, 16, 32, 64, 8, 16, 32, 64, 96, 128};  // of a tile, by W4A16Kernel

// Every byte the same: 0x44 is a valid position and a finite scale of either type.
uint8_t* filled(size_t bytes, int value) {
    uint8_t* memory = nullptr;
    cudaMalloc(&memory, bytes);
    cudaMemset(memory, value, bytes);
    return memory;
}

// Whether it ran.
bool launch(const W4A16Problem& problem) {
    const char* error = w4a16_linear(problem, {0, kMultiprocessors, kCapability, true}, nullptr);
    const cudaError_t status = cudaDeviceSynchronize();
    if (error == nullptr && status != cudaSuccess) error = cudaGetErrorString(status);
    if (error == nullptr) return true;
    std::printf("kernel %d, m %d, n %d: %s\n", static_cast<int>(problem.kernel), problem.m, problem.n, error);
    return false;
}

}  // namespace

int main(int argc, char** argv) {
    const Family* family = nullptr;
    for (const Family& known : kFamilies) {
        if (argc == 2 && std::strcmp(argv[1], known.name) == 0) family = &known;
    }
    if (family == nullptr) {
        std::fprintf(stderr, "usage: small mma | stream | wgmma\n");
        return 2;
    }
    uint8_t* x = filled(kBytes, 0x3c);
    uint8_t* weight = filled(kBytes, 0x44);
    uint8_t* y = filled(kBytes, 0);
    uint8_t* features = filled(1 << 20, 0x3c);
    uint8_t* workspace = filled(w4a16_workspace_bytes(kMultiprocessors), 0);
    int launches = 0, failures = 0;
    for (int kernel = family->first; kernel <= family->last; ++kernel) {
        for (const int group_size : {128, 64, 32, -1}) {
            for (const bool bf16 : {false, true}) {
                for (const int n : {528, 1040, 2304}) {
                    if (n != 528 && group_size != 128) continue;
                    for (const bool more : {false, true}) {  // tokens than a tile holds, or fewer; bias; slices
                        const bool stream = family->first == 4;
                        W4A16Problem problem{};
                        problem.x = x, problem.weight = weight, problem.y = y, problem.workspace = workspace;
                        problem.channel_scale = group_size == -1 ? reinterpret_cast<float*>(features) : nullptr;
                        problem.bias = more ? features : nullptr;
                        problem.m = stream ? kTokens[kernel] - more : kTokens[kernel] * (more ? 2 : 1) - 3 * more;
                        problem.n = n, problem.k = family->k, problem.group_size = group_size, problem.bf16 = bf16;
                        problem.output = static_cast<W4A16Output>(launches % 3);
                        problem.kernel = static_cast<W4A16Kernel>(kernel);
                        problem.slices = family->first == 6 && more ? 2 : 0;
                        failures += !launch(problem);
                        ++launches;
                    }
                }
            }
        }
    }
    std::printf("%s: %d launches, %d failed\n", family->name, launches, failures);
    return failures != 0;
}
