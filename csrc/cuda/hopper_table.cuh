// Which tiles there are for an element type, and what they cost. Each type's kernels are compiled in a file of their
// own.
#pragma once

#include "hopper_linear.cuh"

namespace vllm_sparse::hopper {

using Kernel = void (*)(CUtensorMap, CUtensorMap, KernelArguments);

struct Configuration {
    int tokens, warpgroups, bricks, cluster, split;
    int threads, shared_bytes;
    int stored_tokens;  // per copy of a large tile to global memory; 0: ordinary stores
    int part_bytes;     // of scratch memory per block, 0: none
    float tile_us, brick_us;
    Kernel kernel;
};

struct Table {
    const Configuration* rows;
    int count;
};

template <typename T>
Configuration row(float tile_us, float brick_us) {
    return {T::TOKENS,
            T::WARPGROUPS,
            T::BRICKS,
            T::CLUSTER,
            T::SPLIT,
            T::THREADS,
            T::SHARED_BYTES,
            T::STORES_TILES ? T::STAGED_TOKENS : 0,
            T::FAR_SPLIT ? T::PART_BYTES : 0,
            tile_us,
            brick_us,
            linear_kernel<T>};
}

// The last two numbers are the cost of one tile and of one brick column of it in microseconds, fitted to an H200
// (docs/decisions/0044, 0063, 0064, 0065): they choose between entries, so only their order matters, and up to 192
// tokens only that of entries with equal tokens.
//    tokens warpgroups bricks stages cluster split
template <typename E>
Table table_of_8_bits() {
    static const Configuration rows[] = {
        // Up to 16 tokens rings of half the size leave room for the next kernel's block, which fills its own while this
        // one drains: better where every block has one tile (o, down), worse where it has several.
        row<Tile<E, 8, 1, 2, 8, 1, 2>>(3.01f, 0.104f),    // o, down
        row<Tile<E, 8, 2, 2, 8, 1, 2>>(3.83f, 0.178f),    // qkv, gate_up
        row<Tile<E, 16, 1, 2, 7, 1, 2>>(0.78f, 0.176f),   // o
        row<Tile<E, 16, 1, 2, 12, 1, 2>>(2.29f, 0.121f),  // down
        row<Tile<E, 16, 2, 2, 7, 1, 2>>(2.21f, 0.245f),   // qkv, gate_up
        row<Tile<E, 32, 1, 2, 9, 1, 2>>(0.72f, 0.171f),   // down
        row<Tile<E, 32, 2, 1, 12, 1, 2>>(2.99f, 0.149f),  // all others
        row<Tile<E, 64, 1, 2, 7, 1, 2>>(3.26f, 0.132f),   // o, down
        row<Tile<E, 64, 2, 1, 10, 1, 2>>(3.91f, 0.260f),  // qkv
        row<Tile<E, 64, 2, 1, 10, 2, 1>>(4.00f, 0.353f),  // gate_up
        row<Tile<E, 96, 1, 1, 11, 1, 2>>(0.7f, 0.177f),   // qkv, o, down
        row<Tile<E, 96, 2, 1, 8, 2, 1>>(2.0f, 0.187f),    // gate_up
        row<Tile<E, 128, 1, 1, 9, 1, 2>>(5.60f, 0.160f),  // o, down
        row<Tile<E, 128, 2, 1, 6, 1, 2>>(6.29f, 0.278f),  // qkv
        row<Tile<E, 128, 2, 1, 8, 2, 1>>(6.30f, 0.157f),  // o and down at 512 tokens
        row<Tile<E, 128, 2, 1, 8, 2, 2>>(4.28f, 0.248f),  // o and down at 256 tokens
        row<Tile<E, 128, 2, 1, 8, 4, 1>>(3.50f, 0.234f),  // gate_up; qkv at 256 tokens, o at 384
        row<Tile<E, 128, 3, 1, 6, 2, 1>>(3.67f, 0.347f),  // where 192 features a tile save a wave: qkv at 512 and 1024
        row<Tile<E, 192, 2, 1, 4, 1, 2>>(6.13f, 0.424f),  // qkv, o at 129 to 192 tokens
        row<Tile<E, 192, 2, 1, 5, 2, 2>>(9.00f, 0.255f),  // down at 129 to 192 tokens, 384
        row<Tile<E, 192, 2, 1, 6, 2, 1>>(6.67f, 0.212f),  // gate_up at 129 to 192 tokens, 384
        row<Tile<E, 256, 2, 1, 5, 2, 1>>(7.66f, 0.300f),  // prefill
    };
    return {rows, sizeof(rows) / sizeof(rows[0])};
}

template <typename E>
Table table_of_16_bits() {
    static const Configuration rows[] = {
        row<Tile<E, 16, 1, 2, 12, 1, 2>>(0.10f, 0.123f),  // for 8 tokens too: it loads no more than there are
        row<Tile<E, 32, 1, 2, 9, 1, 2>>(0.10f, 0.129f),  row<Tile<E, 64, 1, 2, 7, 1, 2>>(0.69f, 0.132f),  // o, down
        row<Tile<E, 64, 2, 1, 10, 1, 2>>(0.60f, 0.210f),                                                  // qkv
        row<Tile<E, 64, 2, 1, 10, 2, 1>>(1.00f, 0.200f),                                                  // gate_up
        row<Tile<E, 96, 1, 1, 11, 1, 2>>(1.02f, 0.147f),  // qkv, o, down
        row<Tile<E, 96, 2, 1, 8, 2, 1>>(2.53f, 0.219f),   // gate_up
        row<Tile<E, 128, 1, 1, 9, 1, 2>>(1.63f, 0.190f),  // o, down
        row<Tile<E, 128, 2, 1, 6, 1, 2>>(0.10f, 0.385f),  // qkv
        row<Tile<E, 128, 2, 1, 8, 2, 1>>(2.87f, 0.239f),  // o at 512 tokens
        row<Tile<E, 128, 2, 1, 8, 2, 2>>(4.18f, 0.249f),  // o and down at 256 tokens
        row<Tile<E, 128, 2, 1, 8, 4, 1>>(2.16f, 0.211f),  // gate_up; qkv at 256 tokens, o at 384
        row<Tile<E, 128, 3, 1, 6, 2, 1>>(0.26f, 0.356f),  // qkv and gate_up at 512 tokens
        row<Tile<E, 192, 2, 1, 4, 1, 2>>(2.97f, 0.456f),  // layers with room for half of the clusters below
        row<Tile<E, 192, 2, 1, 5, 2, 2>>(5.08f, 0.332f),  // qkv, o, down at 129 to 192, down at 384 tokens
        row<Tile<E, 192, 2, 1, 6, 2, 1>>(2.79f, 0.297f),  // gate_up at 129 to 192 and 384, o and down at 768 tokens
        row<Tile<E, 192, 3, 1, 5, 2, 1>>(2.42f, 0.520f),  // qkv at 768 tokens
        row<Tile<E, 256, 2, 1, 5, 2, 1>>(4.93f, 0.375f),  // prefill; gate_up from 193 tokens on
        row<Tile<E, 256, 2, 1, 5, 2, 2>>(6.01f, 0.383f),  // down at 512 tokens
    };
    return {rows, sizeof(rows) / sizeof(rows[0])};
}

Table fp8_table();
Table int8_table();
Table bf16_table();
Table fp16_table();

}  // namespace vllm_sparse::hopper
