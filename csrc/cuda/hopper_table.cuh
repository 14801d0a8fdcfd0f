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
    int sum_bytes;      // of one block
    bool shares;        // the columns of the last round's tiles, where there are fewer than clusters
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
            T::WARPGROUPS * T::VECTORS * 128 * 16,
            false,
            tile_us,
            brick_us,
            linear_kernel<T>};
}

// The same kernel, whose clusters share what the last round leaves.
template <typename T>
Configuration shared_row(float tile_us, float brick_us) {
    static_assert(T::SHARES);
    Configuration c = row<T>(tile_us, brick_us);
    c.shares = true;
    return c;
}

// The last two numbers are the cost of one tile and of one brick column of it in microseconds, fitted to an H200
// (docs/decisions/0044, 0063, 0064, 0066, 0067): they choose between entries, so only their order matters, and up to
// 192 tokens only that of entries with equal tokens.
//    tokens warpgroups bricks stages cluster split
template <typename E>
Table table_of_8_bits() {
    static const Configuration rows[] = {
        // Up to 16 tokens rings of half the size leave room for the next kernel's block, which fills its own while this
        // one drains: better where every block has one tile (o, down), worse where it has several.
        row<Tile<E, 8, 1, 2, 8, 1, 2>>(3.01f, 0.104f),           // o, down
        row<Tile<E, 8, 2, 2, 8, 1, 2>>(3.83f, 0.178f),           // qkv, gate_up
        row<Tile<E, 16, 1, 2, 7, 1, 2>>(0.78f, 0.176f),          // o
        row<Tile<E, 16, 1, 2, 12, 1, 2>>(2.29f, 0.121f),         // down
        row<Tile<E, 16, 2, 2, 7, 1, 2>>(2.21f, 0.245f),          // qkv, gate_up
        row<Tile<E, 32, 1, 2, 9, 1, 2>>(0.72f, 0.171f),          // down
        row<Tile<E, 32, 2, 1, 12, 1, 2>>(2.99f, 0.149f),         // all others
        row<Tile<E, 64, 1, 2, 7, 1, 2>>(3.26f, 0.132f),          // o, down
        row<Tile<E, 64, 2, 1, 10, 1, 2>>(3.91f, 0.260f),         // qkv
        row<Tile<E, 64, 2, 1, 10, 2, 1>>(1.60f, 0.235f),         // gate_up; o at 193 to 256 tokens
        row<Tile<E, 96, 1, 1, 11, 1, 2>>(0.7f, 0.177f),          // qkv, o, down
        row<Tile<E, 96, 2, 1, 8, 2, 1>>(2.00f, 0.230f),          // gate_up; o at 257 to 288 tokens
        row<Tile<E, 128, 1, 1, 9, 1, 2>>(0.52f, 0.330f),         // o, down
        row<Tile<E, 128, 2, 1, 6, 1, 2>>(2.21f, 0.382f),         // qkv
        row<Tile<E, 128, 2, 1, 8, 2, 1>>(2.13f, 0.277f),         // o and down at 512 tokens
        shared_row<Tile<E, 128, 2, 1, 8, 2, 1>>(2.13f, 0.277f),  // o and down at 256 tokens
        row<Tile<E, 128, 2, 1, 8, 4, 1>>(2.51f, 0.241f),         // gate_up; qkv at 256 tokens, o at 384
        row<Tile<E, 128, 3, 1, 6, 2, 1>>(3.75f, 0.338f),  // where 192 features a tile save a wave: qkv at 512 and 1024
        row<Tile<E, 144, 1, 1, 8, 1, 2>>(0.50f, 0.345f),  // o, down
        row<Tile<E, 144, 2, 1, 6, 1, 2>>(2.40f, 0.390f),  // qkv
        row<Tile<E, 144, 2, 1, 7, 2, 1>>(2.50f, 0.287f),  // gate_up; qkv at 288 tokens
        shared_row<Tile<E, 144, 2, 1, 7, 2, 1>>(2.50f, 0.287f),  // gate_up and down at 288 tokens
        row<Tile<E, 160, 1, 1, 7, 1, 2>>(0.50f, 0.380f),         // o, down
        row<Tile<E, 160, 2, 1, 5, 1, 2>>(2.90f, 0.400f),         // qkv
        row<Tile<E, 160, 2, 1, 7, 2, 1>>(2.80f, 0.297f),         // gate_up; qkv at 320 tokens
        shared_row<Tile<E, 160, 2, 1, 7, 2, 1>>(2.80f, 0.297f),  // gate_up and down at 320 tokens
        row<Tile<E, 192, 1, 1, 6, 1, 2>>(1.00f, 0.380f),         // o, down
        row<Tile<E, 192, 2, 1, 4, 1, 2>>(3.50f, 0.370f),         // qkv
        row<Tile<E, 192, 2, 1, 6, 2, 1>>(3.48f, 0.317f),         // gate_up; qkv at 384 tokens, o and down at 768
        shared_row<Tile<E, 192, 2, 1, 6, 2, 1>>(3.48f, 0.317f),  // down and gate_up at 384 tokens
        row<Tile<E, 192, 3, 1, 5, 2, 1>>(8.00f, 0.433f),         // qkv at 768 tokens
        row<Tile<E, 256, 2, 1, 5, 2, 1>>(4.55f, 0.390f),         // prefill; gate_up from 193 tokens on
        shared_row<Tile<E, 256, 2, 1, 5, 2, 1>>(4.55f, 0.390f),  // down and gate_up at 512 tokens
    };
    return {rows, sizeof(rows) / sizeof(rows[0])};
}

template <typename E>
Table table_of_16_bits() {
    static const Configuration rows[] = {
        row<Tile<E, 16, 1, 2, 12, 1, 2>>(0.10f, 0.123f),  // for 8 tokens too: it loads no more than there are
        row<Tile<E, 32, 1, 2, 9, 1, 2>>(0.10f, 0.129f),
        row<Tile<E, 64, 1, 2, 7, 1, 2>>(0.69f, 0.132f),          // o, down
        row<Tile<E, 64, 2, 1, 10, 1, 2>>(0.60f, 0.210f),         // qkv
        row<Tile<E, 64, 2, 1, 10, 2, 1>>(1.00f, 0.200f),         // gate_up
        row<Tile<E, 96, 1, 1, 11, 1, 2>>(1.02f, 0.147f),         // qkv, o, down
        row<Tile<E, 96, 2, 1, 8, 2, 1>>(2.53f, 0.219f),          // gate_up
        row<Tile<E, 128, 1, 1, 9, 1, 2>>(0.38f, 0.312f),         // o, down
        row<Tile<E, 128, 2, 1, 6, 1, 2>>(2.14f, 0.356f),         // qkv
        row<Tile<E, 128, 2, 1, 8, 2, 1>>(1.61f, 0.264f),         // o at 512 tokens
        shared_row<Tile<E, 128, 2, 1, 8, 2, 1>>(1.61f, 0.264f),  // o and down at 256 tokens
        row<Tile<E, 128, 2, 1, 8, 4, 1>>(2.17f, 0.234f),         // gate_up; qkv at 256 tokens, o at 384
        row<Tile<E, 128, 3, 1, 6, 2, 1>>(4.39f, 0.323f),         // qkv at 512 and 1024 tokens
        row<Tile<E, 144, 1, 1, 8, 1, 2>>(0.50f, 0.345f),         // o, down
        row<Tile<E, 144, 2, 1, 6, 1, 2>>(2.40f, 0.390f),         // qkv
        row<Tile<E, 144, 2, 1, 7, 2, 1>>(2.40f, 0.275f),         // gate_up; qkv at 288 tokens
        shared_row<Tile<E, 144, 2, 1, 7, 2, 1>>(2.40f, 0.275f),  // gate_up and down at 288 tokens
        row<Tile<E, 160, 1, 1, 7, 1, 2>>(0.50f, 0.380f),         // o, down
        row<Tile<E, 160, 2, 1, 5, 1, 2>>(2.90f, 0.400f),         // qkv
        row<Tile<E, 160, 2, 1, 7, 2, 1>>(3.00f, 0.285f),         // gate_up; qkv at 320 tokens
        shared_row<Tile<E, 160, 2, 1, 7, 2, 1>>(3.00f, 0.285f),  // gate_up and down at 320 tokens
        row<Tile<E, 192, 1, 1, 6, 1, 2>>(1.00f, 0.380f),         // o, down
        row<Tile<E, 192, 2, 1, 4, 1, 2>>(4.00f, 0.400f),         // qkv
        row<Tile<E, 192, 2, 1, 6, 2, 1>>(4.48f, 0.302f),         // gate_up; 768 tokens
        shared_row<Tile<E, 192, 2, 1, 6, 2, 1>>(4.48f, 0.302f),  // 384 tokens
        row<Tile<E, 192, 3, 1, 5, 2, 1>>(8.00f, 0.418f),         // qkv at 768 tokens
        row<Tile<E, 256, 2, 1, 5, 2, 1>>(5.66f, 0.376f),         // prefill; gate_up at 256 tokens
        shared_row<Tile<E, 256, 2, 1, 5, 2, 1>>(5.66f, 0.376f),  // down and gate_up at 512 tokens
    };
    return {rows, sizeof(rows) / sizeof(rows[0])};
}

Table fp8_table();
Table int8_table();
Table bf16_table();
Table fp16_table();

}  // namespace vllm_sparse::hopper
