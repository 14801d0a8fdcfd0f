// The driver: lay out the activations, spread the stripes over the threads, multiply, finish. One parallel region.
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace vllm_sparse::cpu {
namespace {

// Rows multiplied at a time: bounds the memory for laid-out activations.
constexpr std::int64_t kRowsPerPass = 512;
// With more than one tile, columns per block and stripes that share it: a tile's activations (64 KB in bf16) and the
// stripes' weights stay in the L2 cache. 256 to 2048 columns and 4 to 16 stripes are within 5 % on Zen 4.
constexpr std::int64_t kColumnsPerBlock = 2048;
constexpr std::int64_t kStripesPerBlock = 8;

// Grows and never shrinks, one per thread: no allocation in the steady state.
class Scratch {
 public:
    std::uint8_t* get(std::size_t bytes) {
        if (bytes > size_) {
            data_.reset();
            size_ = 0;
            data_.reset(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{kLine})));
            size_ = bytes;
        }
        return data_.get();
    }

 private:
    struct Delete {
        void operator()(std::uint8_t* p) const { ::operator delete(p, std::align_val_t{kLine}); }
    };
    std::unique_ptr<std::uint8_t, Delete> data_;
    std::size_t size_ = 0;
};

std::size_t round_up(std::size_t a, std::size_t b) { return (a + b - 1) / b * b; }

int log2_tile(int rows) { return rows <= 1 ? 0 : 1 + log2_tile((rows + 1) / 2); }

std::int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

struct Part {
    std::int64_t begin, end;
};

// Part `i` of `parts` of 0 .. count - 1.
Part part(std::int64_t count, std::int64_t i, std::int64_t parts) {
    return {count * i / parts, count * (i + 1) / parts};
}

// A tile of tokens: its first row and the rows it is laid out for, 1, 2, 4, 8 or 16. Only the last one is padded.
struct Tile {
    std::int64_t first;
    int rows;
};

// Tiles for `count` rows. A tile costs nearly what its rows cost, padded ones too, so a rest of 5, 6 or 9 to 12 rows
// becomes two tiles (4 + 1, 4 + 2, 8 + 1 to 4): the second finds the stripe in the cache.
std::vector<Tile> tiles_for(std::int64_t count, int max_rows) {
    std::vector<Tile> tiles;
    for (std::int64_t first = 0; first < count; first += tiles.back().rows) {
        const std::int64_t left = count - first;
        int rows = left < max_rows ? 1 << log2_tile(static_cast<int>(left)) : max_rows;
        if (rows >= 8 && 4 * left <= 3 * rows) rows /= 2;
        tiles.push_back({first, rows});
    }
    return tiles;
}

// One pass over at most kRowsPerPass rows.
class Pass {
 public:
    Pass(const Tier& tier, const Weight& weight, const Input& input, const Output& output)
        : tier_(tier), weight_(weight), input_(input), output_(output) {
        const int format = static_cast<int>(weight.format);
        multiply_ = tier.multiply[format];
        const bool bf16_values = input.dtype == Dtype::bf16 || input.quantize == Quantize::fp8;
        if (takes_int8(weight.format)) {
            activation_ = Activation::int8;
            if (input.quantize == Quantize::int8_zero_point && tier.multiply_lowest) multiply_ = tier.multiply_lowest;
        } else if (bf16_values && tier.multiply_bf16 && tier.multiply_bf16[format][0]) {
            activation_ = Activation::bf16;
            multiply_ = tier.multiply_bf16[format];
        } else {
            activation_ = Activation::f32;
        }
        element_bytes_ = activation_ == Activation::f32 ? 4 : activation_ == Activation::bf16 ? 2 : 1;
        panels_ = (weight.k + kColumns - 1) / kColumns;
        tiles_ = tiles_for(input.m, tier.max_rows);
        padded_rows_ = tiles_.back().first + tiles_.back().rows;
    }

    void run() {
        thread_local Scratch shared;
        const std::size_t scales = round_up(input_.m * sizeof(float), kLine);
        std::uint8_t* memory = shared.get(2 * scales + padded_rows_ * panels_ * kColumns * element_bytes_);
        scales_ = reinterpret_cast<float*>(memory);
        zeros_ = reinterpret_cast<std::int32_t*>(memory + scales);
        activations_ = memory + 2 * scales;
#pragma omp parallel
        {
            const std::int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
            if (input_.quantize != Quantize::none) {
                find_scales(part(input_.m, thread, threads));
#pragma omp barrier
            }
            lay_out(thread, threads);
#pragma omp barrier
            multiply(part(stripes(weight_.n), thread, threads));
        }
    }

 private:
    std::uint8_t* activations_of(const Tile& tile) const {
        return activations_ + tile.first * panels_ * kColumns * element_bytes_;
    }

    const void* row(std::int64_t i) const {
        return static_cast<const std::uint8_t*>(input_.x) + i * input_.stride * dtype_bytes(input_.dtype);
    }

    bool has_zero_points() const { return input_.quantize == Quantize::int8_zero_point; }

    void find_scales(Part rows) {
        for (std::int64_t i = rows.begin; i < rows.end; ++i) {
            scales_[i] = input_.scale ? *input_.scale : 0.0f;
            zeros_[i] = input_.zero ? *input_.zero : 0;
            if (!input_.scale) find_scale(tier_.range(row(i), input_.dtype, weight_.k), &scales_[i], &zeros_[i]);
        }
    }

    // A row of zeros has the scale 1, so that its codes stand for zeros.
    void find_scale(const Range& range, float* scale, std::int32_t* zero) const {
        if (has_zero_points()) {
            *scale = (range.highest - range.lowest) / (kHighestCode - kLowestCode);
            if (*scale == 0) *scale = 1.0f;
            *zero = static_cast<std::int32_t>(std::nearbyint(kLowestCode - range.lowest / *scale));
        } else {
            *scale = std::max(range.highest, -range.lowest) / (input_.quantize == Quantize::int8 ? 127.0f : 448.0f);
            if (*scale == 0) *scale = 1.0f;
        }
    }

    void lay_out(std::int64_t thread, std::int64_t threads) {
        const std::int64_t count = static_cast<std::int64_t>(tiles_.size());
        if (count >= threads) {
            const Part mine = part(count, thread, threads);
            for (std::int64_t i = mine.begin; i < mine.end; ++i) lay_out(tiles_[i], {0, panels_});
        } else {
            for (const Tile& tile : tiles_) lay_out(tile, part(panels_, thread, threads));
        }
    }

    void lay_out(const Tile& tile, Part panels) {
        const std::int64_t begin = panels.begin * kColumns, end = std::min(panels.end * kColumns, weight_.k);
        const int real = static_cast<int>(std::min<std::int64_t>(tile.rows, input_.m - tile.first));
        const std::int64_t padded = real < tile.rows ? begin : end / kColumns * kColumns;
        const std::int64_t column_bytes = tile.rows * element_bytes_;
        std::uint8_t* memory = activations_of(tile);
        std::memset(memory + padded * column_bytes, 0, (panels.end * kColumns - padded) * column_bytes);
        for (int r = 0; r < real; ++r)
            tier_.pack({row(tile.first + r), memory, begin, end - begin, r, tile.rows, input_.dtype, activation_,
                        input_.quantize, input_.quantize == Quantize::none ? 1.0f : scales_[tile.first + r],
                        has_zero_points() ? zeros_[tile.first + r] : 0, tier_.int8_offset});
    }

    void multiply(Part mine) {
        thread_local Scratch own;
        const bool blocked = padded_rows_ > kMaxRows;
        const std::int64_t stripes_per_block = blocked ? kStripesPerBlock : 1;
        const std::int64_t group_panels = weight_.group_size / kColumns;
        std::int64_t block_panels = panels_;
        if (blocked) {
            block_panels = std::max<std::int64_t>(kColumnsPerBlock / kColumns, group_panels);
            if (group_panels) block_panels -= block_panels % group_panels;
        }
        const std::size_t bytes = stripes_per_block * padded_rows_ * kChannels * sizeof(float);
        std::uint8_t* sums = own.get(bytes);
        for (std::int64_t first = mine.begin; first < mine.end; first += stripes_per_block) {
            const Part block{first, std::min(first + stripes_per_block, mine.end)};
            std::memset(sums, 0, bytes);
            for (std::int64_t panel = 0; panel < panels_; panel += block_panels)
                for (const Tile& tile : tiles_)
                    for (std::int64_t stripe = block.begin; stripe < block.end; ++stripe)
                        multiply_tile(stripe, tile, {panel, std::min(panel + block_panels, panels_)},
                                      sums_of(sums, stripe - block.begin, tile.first));
            for (std::int64_t stripe = block.begin; stripe < block.end; ++stripe)
                finish(stripe, sums_of(sums, stripe - block.begin, 0));
        }
    }

    std::uint8_t* sums_of(std::uint8_t* sums, std::int64_t stripe, std::int64_t row) const {
        return sums + (stripe * padded_rows_ + row) * kChannels * sizeof(float);
    }

    void multiply_tile(std::int64_t stripe, const Tile& tile, Part panels, void* sums) const {
        Block block{};
        block.weight = weight_.panels + (stripe * panels_ + panels.begin) * panel_bytes(weight_.format);
        block.activations = activations_of(tile) + panels.begin * kColumns * tile.rows * element_bytes_;
        block.sums = sums;
        block.panels = panels.end - panels.begin;
        if (weight_.group_scales) {
            block.group_panels = weight_.group_size / kColumns;
            block.scale_dtype = weight_.group_scale_dtype;
            const std::int64_t group = stripe * (panels_ / block.group_panels) + panels.begin / block.group_panels;
            block.scales = static_cast<const std::uint8_t*>(weight_.group_scales) +
                           group * kChannels * dtype_bytes(block.scale_dtype);
        }
        multiply_[log2_tile(tile.rows)](block);
    }

    void finish(std::int64_t stripe, const std::uint8_t* sums) const {
        const std::int64_t channel = stripe * kChannels;
        Finish f{};
        f.sums = sums;
        if (weight_.sums) f.weight_sums = static_cast<const std::uint8_t*>(weight_.sums) + channel * 4;
        f.row_scales = input_.quantize == Quantize::none ? nullptr : scales_;
        f.row_zeros = has_zero_points() ? zeros_ : nullptr;
        f.channel_scales = weight_.channel_scales ? weight_.channel_scales + channel : nullptr;
        if (output_.bias)
            f.bias = static_cast<const std::uint8_t*>(output_.bias) + channel * dtype_bytes(output_.dtype);
        f.y = static_cast<std::uint8_t*>(output_.y) + channel * dtype_bytes(output_.dtype);
        f.rows = input_.m;
        f.stride = weight_.n;
        f.count = static_cast<int>(std::min<std::int64_t>(kChannels, weight_.n - channel));
        f.factor = weight_.format == Format::w4a8 ? 1.0f / 16 : 1.0f;
        f.offset = tier_.int8_offset;
        f.integer = weight_.format == Format::int8;
        f.dtype = output_.dtype;
        tier_.finish(f);
    }

    const Tier& tier_;
    const Weight& weight_;
    const Input& input_;
    const Output& output_;
    const Multiply* multiply_;
    Activation activation_;
    std::vector<Tile> tiles_;
    std::int64_t element_bytes_, panels_, padded_rows_;
    float* scales_ = nullptr;
    std::int32_t* zeros_ = nullptr;
    std::uint8_t* activations_ = nullptr;
};

}  // namespace

void linear(const Tier& tier, const Weight& weight, const Input& input, const Output& output) {
    for (std::int64_t first = 0; first < input.m; first += kRowsPerPass) {
        Input rows = input;
        Output result = output;
        rows.m = std::min(kRowsPerPass, input.m - first);
        rows.x = static_cast<const std::uint8_t*>(input.x) + first * input.stride * dtype_bytes(input.dtype);
        result.y = static_cast<std::uint8_t*>(output.y) + first * weight.n * dtype_bytes(output.dtype);
        Pass(tier, weight, rows, result).run();
    }
}

}  // namespace vllm_sparse::cpu
