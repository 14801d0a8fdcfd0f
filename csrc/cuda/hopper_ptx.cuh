// Thin names for the PTX instructions of sm_90a that C++ has no words for. No logic lives here.
// Shared-memory addresses are 32-bit (`shared_address`), barriers are 8-byte mbarrier objects.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace vllm_sparse::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier -------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives on the barrier at the same offset in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    while (!barrier_test(barrier, parity)) {
    }
}

// ---- the copy engine ------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint64_t policy_evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t policy_evict_normal() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t policy_evict_last() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void copy_bulk(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            destination),
        "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void copy_tile(uint32_t destination, const CUtensorMap* map, int column, int row, int plane,
                                          uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(destination),
        "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier), "l"(policy)
        : "memory");
}

// The same tile to the same offset of every block in `blocks`; each one's barrier at that offset counts the bytes.
__device__ __forceinline__ void copy_tile_multicast(uint32_t destination, const CUtensorMap* map, int column, int row,
                                                    int plane, uint32_t barrier, uint16_t blocks, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6, %7;" ::"r"(destination),
        "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier), "h"(blocks), "l"(policy)
        : "memory");
}

// Shared memory to a tile of global memory; what lies outside the map is dropped. Counts as one group of this thread.
__device__ __forceinline__ void store_tile(const CUtensorMap* map, int column, int row, uint32_t source) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
        "cp.async.bulk.commit_group;" ::"l"(map),
        "r"(column), "r"(row), "r"(source)
        : "memory");
}

// Returns once at most PENDING of this thread's groups have still to read shared memory.
template <int PENDING>
__device__ __forceinline__ void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Makes this thread's ordinary writes to shared memory visible to the copy engine.
__device__ __forceinline__ void copy_engine_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders what other threads wrote to global memory, and this one has been told of, before its own copies of it.
__device__ __forceinline__ void copy_engine_fence_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- grids, clusters, groups of threads -----------------------------------------------------------------------------
// Lets the next kernel of the stream start its independent part (its weight loads) now.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Returns once every kernel before this one in the stream has finished and its writes are visible.
__device__ __forceinline__ void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Publishes nothing (a release would fence all of the thread's global writes): barrier_init_fence() does that for
// barriers.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of the block, which may wait at different places of the program, as those at __syncthreads() may not.
__device__ __forceinline__ void sync_block() { asm volatile("barrier.sync 0;" ::: "memory"); }

// All consumer warpgroups (of at most three; their own barriers are 1 to 3).
template <int WARPGROUPS>
__device__ __forceinline__ void sync_consumers() {
    asm volatile("bar.sync 4, %0;" ::"n"(128 * WARPGROUPS) : "memory");
}

__device__ __forceinline__ void sync_warpgroup(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// ---- background copies of single words by this thread
// ----------------------------------------------------------------
__device__ __forceinline__ void copy_async_4(uint32_t destination, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(destination), "l"(source) : "memory");
}
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- shared and global memory ---------------------------------------------------------------------------------------
__device__ __forceinline__ void load_shared(uint32_t address, uint32_t (&words)[1]) {
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared(uint32_t address, uint32_t (&words)[2]) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
}

// Words by which warps of different clusters tell each other what they have written.
__device__ __forceinline__ void store_release(uint64_t* address, uint64_t value) {
    asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

// Writes two 8x8 matrices of 16-bit values transposed: lane i of 0..15 gives the address of one row of 8.
__device__ __forceinline__ void store_matrix_transposed(uint32_t address, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b)
                 : "memory");
}

// Writes to the shared memory of block `rank` of the cluster; that block's barrier counts the 16 bytes. (One overload
// per type: ptxas waits for the tensor cores around a conversion of their sums.)
#define VLLM_SPARSE_STORE_REMOTE(kind)                                                                               \
    asm volatile(                                                                                                    \
        "{\n.reg .b32 to, counter;\n"                                                                                \
        "mapa.shared::cluster.u32 to, %0, %6;\n"                                                                     \
        "mapa.shared::cluster.u32 counter, %5, %6;\n"                                                                \
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%1, %2, %3, %4}, [counter];\n}" :: \
            "r"(address),                                                                                            \
        kind(a), kind(b), kind(c), kind(d), "r"(barrier), "r"(rank)                                                  \
        : "memory")
__device__ __forceinline__ void store_remote(uint32_t address, float a, float b, float c, float d, uint32_t barrier,
                                             uint32_t rank) {
    VLLM_SPARSE_STORE_REMOTE("f");
}
__device__ __forceinline__ void store_remote(uint32_t address, int a, int b, int c, int d, uint32_t barrier,
                                             uint32_t rank) {
    VLLM_SPARSE_STORE_REMOTE("r");
}
#undef VLLM_SPARSE_STORE_REMOTE

}  // namespace vllm_sparse::ptx
