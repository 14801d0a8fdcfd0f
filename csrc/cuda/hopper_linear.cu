#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <random>

#include "device_guard.h"
#include "hopper_table.cuh"
#include "launch.h"

namespace vllm_sparse::hopper {
namespace {

const Table& table(Element element) {
    static const Table tables[kElements] = {fp8_table(), int8_table(), bf16_table(), fp16_table()};
    return tables[static_cast<int>(element)];
}

// What is known of an element's kernels on a device.
constexpr int kMaxDevices = 64;
constexpr int kMaxRows = 40;
struct Device {
    int multiprocessors = 0;
    int workers[kMaxRows] = {};  // clusters that run at once with one block per multiprocessor
    std::once_flag once;
    const char* error = nullptr;
};
Device devices[kMaxDevices][kElements];

int blocks_per_cluster(const Configuration& c) { return c.cluster > 1 ? c.cluster : c.split; }

// Allows large shared memory and counts the clusters that fit: fewer than multiprocessors / size where a cluster may
// not span two groups of multiprocessors. All of a block's possible shared memory is asked for, so that one block fits
// on each.
const char* prepare_kernel(const Configuration& c, int* workers) {
    constexpr int kAllShared = 232448;
    const auto kernel = reinterpret_cast<const void*>(c.kernel);
    if (const char* error = allow_shared(kernel, kAllShared)) return error;
    const int cluster = blocks_per_cluster(c);
    return vllm_sparse::count_clusters({kernel, cluster, c.threads, kAllShared, cluster}, workers);
}

// Once per device, which is current, and element: permissions and sizes.
const char* prepare_device(int index, Element element, Device** device) {
    if (index < 0 || index >= kMaxDevices) return "the device index is not in 0 ... 63";
    Device& d = devices[index][static_cast<int>(element)];
    std::call_once(d.once, [&d, index, element] {
        d.error = text(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index));
        const Table& t = table(element);
        for (int i = 0; i < t.count && d.error == nullptr; ++i) d.error = prepare_kernel(t.rows[i], &d.workers[i]);
    });
    *device = &d;
    return d.error;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A map of bytes. `bricks` per copy, as planes of the map; 0 where k ends inside a plane: only a flat map fills that
// with zeros.
bool map_x(const LinearArguments& a, int rows, int bricks, CUtensorMap* map) {
    const int row_bytes = a.k * element_bytes(a.element);
    const cuuint64_t sizes[3] = {cuuint64_t(bricks ? kBrickRowBytes : row_bytes), cuuint64_t(a.m),
                                 cuuint64_t(bricks ? row_bytes / kBrickRowBytes : 1)};
    const cuuint64_t strides[2] = {cuuint64_t(a.x_stride), kBrickRowBytes};
    const cuuint32_t box[3] = {kBrickRowBytes, cuuint32_t(rows), cuuint32_t(bricks ? bricks : 1)};
    const cuuint32_t steps[3] = {1, 1, 1};
    return encode_tiled()(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(a.x), sizes, strides, box, steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool map_out(const LinearArguments& a, int tokens, CUtensorMap* map) {
    const cuuint64_t sizes[2] = {cuuint64_t(a.n), cuuint64_t(a.m)};
    const cuuint64_t strides[1] = {cuuint64_t(a.n) * 2};
    const cuuint32_t box[2] = {64, cuuint32_t(tokens)}, steps[2] = {1, 1};
    return encode_tiled()(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, a.out, sizes, strides, box, steps,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Clusters that run at once, as the choice takes it. Some of the chip's groups of multiprocessors are not a multiple of
// four: of 132 multiprocessors 31 clusters of four use 124.
int count_clusters(int multiprocessors, int size) {
    const int usable = size > 2 ? multiprocessors - multiprocessors / 16 : multiprocessors;
    return std::max(1, usable / size);
}

int count_tiles(const Configuration& c, int m, int n) {
    return ceil_div(m, c.tokens) * ceil_div(ceil_div(n, kBrickFeatures), c.warpgroups * c.cluster);
}

// What `workers` clusters do with the tiles: rounds of whole ones, and then, if the configuration shares and there are
// clusters for it, two of them each tile that is left. The last two tiles of tokens may overlap, and have to add up
// what both of them write in one order: then they are both whole or both shared.
struct Rounds {
    int whole, shared_tiles;
};
Rounds plan_rounds(const Configuration& c, int m, int n, int workers) {
    const int tiles = count_tiles(c, m, n), token_tiles = ceil_div(m, c.tokens);
    const int whole = tiles / workers, left = tiles % workers;
    const bool apart = m % c.tokens != 0 && token_tiles > 1 && whole * workers % token_tiles == token_tiles - 1;
    if (!c.shares || 2 * left > workers || apart) return {ceil_div(tiles, workers), 0};
    return {whole, left};
}

// A word that no memory holds: random, and another one for every launch.
uint64_t new_key() {
    static std::atomic<uint64_t> last{[] {
        std::random_device random;
        return uint64_t(random()) << 32 | random();
    }()};
    uint64_t key = last.fetch_add(0x9E3779B97F4A7C15);
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9;
    key = (key ^ key >> 27) * 0x94D049BB133111EB;
    return (key ^ key >> 31) | 1;  // not the 0 that readers leave
}

}  // namespace

int configuration_count(Element element) { return table(element).count; }
int configuration_tokens(Element element, int configuration) { return table(element).rows[configuration].tokens; }

int choose_configuration(Element element, int m, int n, int k, int multiprocessors) {
    // Up to this many tokens one tile holds them all, and the smallest such tile is the fastest.
    constexpr int kOneTile = 192;
    // What it takes to hand a tile's sums over, on top of half of its columns; fitted as the table's numbers are.
    constexpr float kSharingUs = 3.0f;
    const Table& t = table(element);
    const int bricks = ceil_div(k * element_bytes(element), kBrickRowBytes);
    int fewest = 64;  // smaller ones never pay there
    if (m <= kOneTile) {
        fewest = kOneTile;
        for (int i = 0; i < t.count; ++i) {
            if (t.rows[i].tokens >= m) fewest = std::min(fewest, t.rows[i].tokens);
        }
    }
    int best = -1;
    float best_us = 0.f;
    for (int i = 0; i < t.count; ++i) {
        const Configuration& c = t.rows[i];
        if (c.tokens < fewest || (m <= kOneTile && c.tokens != fewest)) continue;
        // Clusters that share the tokens' loads as well are faster there; these rows' costs are those of one tile.
        if (m > kOneTile && c.split > 1) continue;
        const Rounds rounds = plan_rounds(c, m, n, count_clusters(multiprocessors, blocks_per_cluster(c)));
        if (c.shares && (rounds.shared_tiles == 0 || m <= kOneTile)) continue;
        const float columns = ceil_div(bricks, c.split);
        float us = rounds.whole * (c.tile_us + c.brick_us * columns);
        if (c.shares) us += kSharingUs + c.tile_us + c.brick_us * columns / 2;
        if (best < 0 || us < best_us) best = i, best_us = us;
    }
    return best;
}

int64_t scratch_bytes(Element element, int m, int n, int k, int multiprocessors, int configuration) {
    if (configuration < 0) configuration = choose_configuration(element, m, n, k, multiprocessors);
    const Configuration& c = table(element).rows[configuration];
    if (!c.shares) return 0;
    const int shared_tiles = std::min(multiprocessors / c.cluster / 2, count_tiles(c, m, n));
    return int64_t(shared_tiles) * c.cluster * (c.sum_bytes + c.warpgroups * int(sizeof(uint64_t)));
}

const char* linear(const LinearArguments& a, int configuration, bool programmatic, void* stream) {
    if (a.m == 0) return nullptr;
    const int row_bytes = a.k * element_bytes(a.element);
    if (a.m < 0 || a.n <= 0 || a.k <= 0 || a.n % 16 != 0 || row_bytes % 32 != 0)
        return "n must be a multiple of 16 and rows of x of 32 bytes";
    if (reinterpret_cast<uintptr_t>(a.x) % 16 != 0 || a.x_stride % 16 != 0)
        return "x and its rows must be aligned to 16 bytes";
    if (configuration >= table(a.element).count) return "there is no such configuration";
    const DeviceGuard guard(a.device);
    if (guard.error != nullptr) return guard.error;
    Device* device;
    if (const char* error = prepare_device(a.device, a.element, &device)) return error;
    if (configuration < 0) configuration = choose_configuration(a.element, a.m, a.n, a.k, device->multiprocessors);
    const Configuration& c = table(a.element).rows[configuration];

    if (c.shares && a.scratch == nullptr) return "this configuration needs scratch memory";
    if (encode_tiled() == nullptr) return "the CUDA driver has no cuTensorMapEncodeTiled";
    KernelArguments args;
    args.x_rows = std::min(c.tokens, ceil_div(a.m, 8 * c.cluster) * 8 * c.cluster) / c.cluster;
    args.x_planes = row_bytes % kBrickRowBytes == 0;
    CUtensorMap x_map, out_map = {};
    if (!map_x(a, args.x_rows, args.x_planes ? c.bricks : 0, &x_map)) return "the driver refused the tensor map of x";
    if (c.stored_tokens > 0 && !map_out(a, c.stored_tokens, &out_map))
        return "the driver refused the tensor map of the output";
    args.weight = static_cast<const uint8_t*>(a.weight);
    args.weight_scale = a.weight_scale;
    args.x_scale = a.x_scale;
    args.x_zero = a.x_zero;
    args.weight_sum = a.weight_sum;
    args.x_scale_stride = a.x_scale_per_token ? 1 : 0;
    args.bias = a.bias;
    args.out = a.out;
    args.m = a.m;
    args.n = a.n;
    args.half_out = a.half_out;
    args.column_tiles = ceil_div(row_bytes, kPaddingBricks * kBrickRowBytes) * kPaddingBricks / c.bricks;
    args.token_tiles = ceil_div(a.m, c.tokens);
    args.feature_tiles = ceil_div(a.n, kBrickFeatures);
    args.tiles = count_tiles(c, a.m, a.n);
    const int workers = device->workers[configuration];
    const Rounds rounds = plan_rounds(c, a.m, a.n, workers);
    args.rounds = rounds.whole;
    args.shared_tiles = rounds.shared_tiles;
    args.overlap = programmatic;
    args.scratch = a.scratch;
    args.key = c.shares ? new_key() : 0;
    args.stream_weight = args.token_tiles == 1;
    const int cluster_size = blocks_per_cluster(c);
    const int clusters = std::min(workers, rounds.whole > 0 ? args.tiles : 2 * args.shared_tiles);

    void* arguments[] = {&x_map, &out_map, &args};
    return launch({reinterpret_cast<const void*>(c.kernel), clusters * cluster_size, c.threads, c.shared_bytes,
                   cluster_size, programmatic, static_cast<cudaStream_t>(stream)},
                  arguments);
}

}  // namespace vllm_sparse::hopper
