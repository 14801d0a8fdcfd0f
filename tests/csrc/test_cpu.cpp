// Every tier, format, tile and ragged shape against a plain double product, with buffers of exactly the sizes that
// linear.h asks for, so that a sanitizer sees any access beyond them. Thread counts 1, 2 and more than cores.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/calibrate.h"
#include "cpu/linear.h"

namespace {

using namespace vllm_sparse::cpu;

std::mt19937 generator(0);

int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

float from_bf16(std::uint16_t b) {
    const std::uint32_t u = static_cast<std::uint32_t>(b) << 16;
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}

double from_small_float(unsigned code, int exponent_bits, int mantissa_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int mantissa = code & ((1 << mantissa_bits) - 1);
    const int exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
    const double sign = code >> (exponent_bits + mantissa_bits) & 1 ? -1 : 1;
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

// A random weight as the kernels take it and, dense, as double.
struct Case {
    Format format;
    std::int64_t n, k, group_size;
    std::vector<std::uint8_t> panels;
    std::vector<float> group_scales, channel_scales, float_sums;
    std::vector<std::int32_t> sums;
    std::vector<double> dense;

    Case(Format f, std::int64_t rows, std::int64_t columns, std::int64_t group)
        : format(f), n(rows), k(columns), group_size(group) {
        static const int pairs[] = {4, 8, 12, 9, 13, 14};
        const int bytes = value_bits(format) == 16 ? 2 : 1;
        const std::int64_t padded = stripes(n) * kChannels, groups = group_size ? k / group_size : 1;
        std::vector<std::uint8_t> values(n * k / 2 * bytes), positions(n * ((k + 7) / 8), 0);
        std::vector<float> scales(n * groups);
        for (float& s : scales) s = format == Format::bf16 || format == Format::fp16 ? 1.0f : uniform(1, 8) / 4.0f;
        dense.resize(n * k);
        sums.resize(padded);
        float_sums.resize(padded);
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t g = 0; g < k / 4; ++g) {
                const int nibble = pairs[uniform(0, 5)];
                positions[i * ((k + 7) / 8) + g / 2] |= nibble << (4 * (g % 2));
                const float scale = scales[i * groups + (group_size ? 4 * g / group_size : 0)];
                for (int e = 0; e < 2; ++e) {
                    const double value = draw(&values[(i * (k / 2) + 2 * g + e) * bytes]);
                    dense[i * k + 4 * g + (nibble >> (2 * e) & 3)] = value * scale;
                    float_sums[i] += static_cast<float>(16 * value * (group_size ? scale : 1));
                }
            }
        }
        panels.resize(packed_bytes(format, n, k));
        pack(format, n, k, values.data(), positions.data(), panels.data(), sums.data());
        lay_out(scales, groups, padded);
    }

    double draw(std::uint8_t* to) const {
        unsigned code = uniform(0, 255);
        double value = static_cast<std::int8_t>(code);
        if (format == Format::w4a16 || format == Format::w4a8) {
            value = uniform(-8, 7);
            code = static_cast<std::uint8_t>(static_cast<int>(value));
        } else if (format == Format::fp8) {
            code = (code & 127) == 127 ? 0 : code;
            value = from_small_float(code, 4, 3);
        } else if (format == Format::bf16) {
            code = (0x3f80 ^ (code & 0xff)) | (code & 1) << 15;
            value = from_bf16(static_cast<std::uint16_t>(code));
        } else if (format == Format::fp16) {
            code = code << 6 | (code & 1) << 15;
            value = from_small_float(code, 5, 10);
        }
        to[0] = static_cast<std::uint8_t>(code);
        if (value_bits(format) == 16) to[1] = static_cast<std::uint8_t>(code >> 8);
        return value;
    }

    void lay_out(const std::vector<float>& scales, std::int64_t groups, std::int64_t padded) {
        if (group_size) {
            group_scales.resize(padded * groups);
            for (std::int64_t i = 0; i < n; ++i)
                for (std::int64_t g = 0; g < groups; ++g)
                    group_scales[(i / kChannels * groups + g) * kChannels + i % kChannels] = scales[i * groups + g];
        } else if (format != Format::bf16 && format != Format::fp16) {
            channel_scales.resize(padded);
            for (std::int64_t i = 0; i < n; ++i) channel_scales[i] = scales[i] * (format == Format::fp8 ? 256 : 1);
        }
    }

    Weight weight() const {
        const auto or_null = [](const auto& v) { return v.empty() ? nullptr : v.data(); };
        const void* all_sums = nullptr;
        if (format == Format::int8) all_sums = sums.data();
        if (format == Format::w4a8) all_sums = float_sums.data();
        return {format,  n, k, group_size, panels.data(), or_null(group_scales), Dtype::f32, or_null(channel_scales),
                all_sums};
    }
};

// Integers in x, a static scale of one and results in float: exact up to the order of the additions.
bool check(const Tier& tier, const Case& c, std::int64_t m) {
    std::vector<float> x(m * c.k), y(m * c.n), bias(c.n), one(1, 1.0f);
    for (float& v : x) v = static_cast<float>(uniform(-15, 15));
    for (float& v : bias) v = static_cast<float>(uniform(-9, 9));
    Quantize quantize = Quantize::none;
    if (takes_int8(c.format)) quantize = Quantize::int8;
    if (c.format == Format::fp8) quantize = Quantize::fp8;
    linear(tier, c.weight(), {x.data(), Dtype::f32, m, c.k, quantize, one.data()}, {y.data(), Dtype::f32, bias.data()});
    double error = 0, size = 0;
    for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t j = 0; j < c.n; ++j) {
            double want = bias[j];
            for (std::int64_t l = 0; l < c.k; ++l) want += x[i * c.k + l] * c.dense[j * c.k + l];
            error += (y[i * c.n + j] - want) * (y[i * c.n + j] - want);
            size += want * want;
        }
    }
    if (error <= 1e-10 * size) return true;
    std::printf("%s format %d m %ld n %ld k %ld group %ld: relative error %g\n", tier.name, static_cast<int>(c.format),
                static_cast<long>(m), static_cast<long>(c.n), static_cast<long>(c.k), static_cast<long>(c.group_size),
                std::sqrt(error / size));
    return false;
}

// X^T X of m tokens, in a buffer of rows 3 wider than k.
bool check_gram(const Tier& tier, int m, int k) {
    const int stride = k + 3;
    std::vector<std::uint16_t> x(m == 0 ? 0 : (m - 1) * stride + k);
    for (auto& one : x) one = static_cast<std::uint16_t>(uniform(0, 1) << 15 | uniform(0x3e80, 0x3fff));
    std::vector<float> sum(k * k, 1.0f);
    gram(tier, x.data(), m, k, stride, sum.data());
    for (int i = 0; i < k; ++i)
        for (int j = i; j < k; ++j) {
            double exact = 1;
            for (int t = 0; t < m; ++t) exact += double(from_bf16(x[t * stride + i])) * from_bf16(x[t * stride + j]);
            if (std::abs(sum[i * k + j] - exact) > 1e-4 * (m + 1)) return false;
        }
    return true;
}

// Every loop on random columns: pruned to two of four, what is kept on the grid, and nothing outside the buffers.
bool check_columns(const Tier& tier, Columns::Kind kind, int count, int n, bool rounds, bool fp8) {
    std::vector<float> weight(count * n), gradient(count * n), errors(count * n), square(count * count);
    std::vector<float> scales(count * n, 0.25f);
    std::vector<std::uint8_t> keep(count * n);
    for (auto& one : weight) one = static_cast<float>(uniform(-1000, 1000)) / 500;
    for (auto& one : gradient) one = static_cast<float>(uniform(-1000, 1000)) / 500;
    for (auto& one : keep) one = static_cast<std::uint8_t>(uniform(0, 1));
    for (int i = 0; i < count; ++i)
        for (int j = i; j < count; ++j) square[i * count + j] = square[j * count + i] = i == j ? 1.0f : 0.05f;
    const Columns loop{kind,
                       count,
                       count,
                       weight.data(),
                       gradient.data(),
                       keep.data(),
                       rounds ? scales.data() : nullptr,
                       square.data(),
                       errors.data(),
                       fp8 ? 448.0f : 7.0f,
                       fp8};
    columns(tier, loop, n);
    for (int i = 0; i < count * n; ++i) {
        if (!std::isfinite(errors[i]) || (!keep[i] && weight[i] != 0)) return false;
        if (rounds && !fp8 && weight[i] * 4 != std::nearbyint(weight[i] * 4)) return false;
    }
    if (kind == Columns::Kind::sparsegpt)
        for (int j = 0; j < count; j += 4)
            for (int i = 0; i < n; ++i) {
                int kept = 0;
                for (int c = 0; c < 4; ++c) kept += keep[(j + c) * n + i];
                if (kept != 2) return false;
            }
    return true;
}

}  // namespace

int main() {
    int checks = 0, failures = 0;
    for (int format = 0; format < kFormats; ++format) {
        const bool grouped =
            static_cast<Format>(format) == Format::w4a16 || static_cast<Format>(format) == Format::w4a8;
        for (auto [n, k] : {std::pair{1, 4}, {17, 36}, {16, 64}, {150, 2176}}) {
            const Case c(static_cast<Format>(format), n, k, grouped && k % 32 == 0 ? (k > 64 ? 128 : 32) : 0);
            for (int threads : {1, 2, 7}) {
                omp_set_num_threads(threads);
                for (const Tier* tier : available_tiers())
                    for (int m : {0, 1, 2, 3, 8, 16, 17, 40}) {
                        ++checks;
                        failures += !check(*tier, c, m);
                    }
            }
        }
    }
    for (const Tier* tier : available_tiers())
        for (int threads : {1, 2, 7}) {
            omp_set_num_threads(threads);
            if (tier->gram)
                for (auto [m, k] : {std::pair{0, 4}, {1, 1}, {3, 20}, {515, 17}, {40, 100}, {1030, 64}}) {
                    ++checks;
                    failures += !check_gram(*tier, m, k);
                }
            if (tier->columns)
                for (auto kind : {Columns::Kind::sparsegpt, Columns::Kind::gptq, Columns::Kind::descent})
                    for (auto [count, n] : {std::pair{4, 1}, {8, 63}, {128, 150}})
                        for (int way : {0, 1, 2}) {
                            if (way == 0 && kind == Columns::Kind::descent) continue;
                            ++checks;
                            failures += !check_columns(*tier, kind, count, n, way > 0, way == 2);
                        }
        }
    std::printf("%d checks, %d failures\n", checks, failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
