// The loops over columns: plain loops over the rows of a weight, which the compiler makes vectors of.
#include "panel.h"

namespace vllm_sparse::cpu {
namespace {

constexpr float kHalfEven = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer, halves to even

float least(float a, float b) { return a < b ? a : b; }
float most(float a, float b) { return a > b ? a : b; }

template <bool fp8>
float on_grid(float x, float scale, float max_code) {
    float code = x / scale;
    if constexpr (fp8) {  // e4m3: three bits after the leading one, and no exponent below -6
        code = most(least(code, max_code), -max_code);
        std::uint32_t bits;
        __builtin_memcpy(&bits, &code, sizeof bits);
        bits &= 0x7f800000u;
        float leading;
        __builtin_memcpy(&leading, &bits, sizeof leading);
        const float step = most(leading, 0.015625f) * 0.125f;
        code = ((code / step + kHalfEven) - kHalfEven) * step;
    } else {
        code = most(least((code + kHalfEven) - kHalfEven, max_code), -max_code - 1);
    }
    return code * scale;
}

// Keeps the two largest of each group of four, of equal ones the first, as keep_two_of_four does.
void choose(const Columns& c, std::int64_t j, std::int64_t from, std::int64_t to, std::int64_t n) {
    const float *w0 = c.weight + j * n, *w1 = w0 + n, *w2 = w1 + n, *w3 = w2 + n;
    std::uint8_t *k0 = c.keep + j * n, *k1 = k0 + n, *k2 = k1 + n, *k3 = k2 + n;
    const float* diagonal = c.square + j * (c.ld + 1);
    const float d0 = diagonal[0], d1 = diagonal[c.ld + 1], d2 = diagonal[2 * (c.ld + 1)], d3 = diagonal[3 * (c.ld + 1)];
#pragma GCC ivdep
    for (std::int64_t i = from; i < to; ++i) {
        const float a = (w0[i] / d0) * (w0[i] / d0), b = (w1[i] / d1) * (w1[i] / d1);
        const float e = (w2[i] / d2) * (w2[i] / d2), f = (w3[i] / d3) * (w3[i] / d3);
        const int ab = a >= b, ae = a >= e, af = a >= f, be = b >= e, bf = b >= f, ef = e >= f;
        k0[i] = ab + ae + af >= 2;
        k1[i] = (1 - ab) + be + bf >= 2;
        k2[i] = (1 - ae) + (1 - be) + ef >= 2;
        k3[i] = (1 - af) + (1 - bf) + (1 - ef) >= 2;
    }
}

template <bool rounds, bool fp8>
void forward(const Columns& c, std::int64_t from, std::int64_t to, std::int64_t n) {
    for (std::int64_t j = 0; j < c.count; ++j) {
        if (c.kind == Columns::Kind::sparsegpt && j % 4 == 0) choose(c, j, from, to, n);
        const float* row = c.square + j * c.ld;
        const float diagonal = row[j];
        float *w = c.weight + j * n, *errors = c.errors + j * n;
        const float* scales = rounds ? c.scales + j * n : nullptr;
        const std::uint8_t* keep = c.keep + j * n;
#pragma GCC ivdep
        for (std::int64_t i = from; i < to; ++i) {
            float target = w[i];
            if constexpr (rounds) target = on_grid<fp8>(target, scales[i], c.max_code);
            target = keep[i] ? target : 0.0f;
            errors[i] = (w[i] - target) / diagonal;
            w[i] = target;
        }
        for (std::int64_t later = j + 1; later < c.count; ++later) {
            float* other = c.weight + later * n;
            const float share = row[later];
#pragma GCC ivdep
            for (std::int64_t i = from; i < to; ++i) other[i] -= share * errors[i];
        }
    }
}

template <bool fp8>
void descent(const Columns& c, std::int64_t from, std::int64_t to, std::int64_t n) {
    for (std::int64_t j = 0; j < c.count; ++j) {
        const float* row = c.square + j * c.ld;
        float *q = c.weight + j * n, *changes = c.errors + j * n;
        const float *scales = c.scales + j * n, *gradient = c.gradient + j * n;
        const std::uint8_t* keep = c.keep + j * n;
        float slope[64];
        for (std::int64_t i = from; i < to; ++i) slope[i - from] = gradient[i];
        for (std::int64_t before = 0; before < j; ++before) {
            const float* change = c.errors + before * n;
            const float share = row[before];
#pragma GCC ivdep
            for (std::int64_t i = from; i < to; ++i) slope[i - from] -= share * change[i];
        }
#pragma GCC ivdep
        for (std::int64_t i = from; i < to; ++i) {
            float best = on_grid<fp8>(q[i] + slope[i - from] / row[j], scales[i], c.max_code);
            best = keep[i] ? best : 0.0f;
            changes[i] = best - q[i];
            q[i] = best;
        }
    }
}

}  // namespace

void avx512_columns(const Columns& c, std::int64_t from, std::int64_t to, std::int64_t n) {
    if (c.kind == Columns::Kind::descent) {
        c.fp8 ? descent<true>(c, from, to, n) : descent<false>(c, from, to, n);
    } else if (c.scales == nullptr) {
        forward<false, false>(c, from, to, n);
    } else {
        c.fp8 ? forward<true, true>(c, from, to, n) : forward<true, false>(c, from, to, n);
    }
}

}  // namespace vllm_sparse::cpu
