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
    bool several_tiles;  // of tokens, and slices of a tile's columns
};
constexpr Family kFamilies[] = {{"mma", 0, 3, 1408, true}, {"stream", 4, 5, 2944, false}, {"wgmma", 6, 9, 1408, true}};
constexpr int kTokens[] = {8, 16, 32, 64, 8, 16, 32, 64, 96, 128};  // of a tile, by W4A16Kernel

struct Layer {
    int n, group_size;
};
constexpr Layer kLayers[] = {{528, 128}, {1040, 128}, {2304, 128}, {528, 64}, {528, 32}, {528, -1}};

// Every byte the same: 0x44 is a valid position and a finite scale of either type.
uint8_t* filled(size_t bytes, int value) {
    uint8_t* memory = nullptr;
    cudaMalloc(&memory, bytes);
    cudaMemset(memory, value, bytes);
    return memory;
}

struct Memory {
    uint8_t* x = filled(kBytes, 0x3c);
    uint8_t* weight = filled(kBytes, 0x44);
    uint8_t* y = filled(kBytes, 0);
    uint8_t* features = filled(1 << 20, 0x3c);  // bias, or the channels' scales
    uint8_t* workspace = filled(w4a16_workspace_bytes(kMultiprocessors), 0);
};

// A whole tile of tokens without bias, or another number of them with one.
W4A16Problem make(const Family& family, int kernel, const Layer& layer, bool bf16, bool other, const Memory& memory) {
    W4A16Problem problem{};
    problem.x = memory.x, problem.weight = memory.weight, problem.y = memory.y, problem.workspace = memory.workspace;
    problem.channel_scale = layer.group_size == -1 ? reinterpret_cast<float*>(memory.features) : nullptr;
    problem.bias = other ? memory.features : nullptr;
    problem.m = kTokens[kernel];
    if (other) problem.m = family.several_tiles ? 2 * problem.m - 3 : problem.m - 1;
    problem.n = layer.n, problem.k = family.k, problem.group_size = layer.group_size, problem.bf16 = bf16;
    problem.kernel = static_cast<W4A16Kernel>(kernel);
    problem.slices = other && family.several_tiles ? 2 : 0;
    return problem;
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
    const Memory memory;
    int launches = 0, failures = 0;
    for (int kernel = family->first; kernel <= family->last; ++kernel) {
        for (const Layer& layer : kLayers) {
            for (const int variant : {0, 1, 2, 3}) {
                W4A16Problem problem = make(*family, kernel, layer, variant % 2, variant / 2, memory);
                problem.output = static_cast<W4A16Output>(launches++ % 3);
                failures += !launch(problem);
            }
        }
    }
    std::printf("%s: %d launches, %d failed\n", family->name, launches, failures);
    return failures != 0;
}
