// Threads and blocks around the inner loops of calibrate.h. Compiled for the baseline.
#include "calibrate.h"

#include <algorithm>
#include <vector>

namespace vllm_sparse::cpu {
namespace {

constexpr std::int64_t kTokens = 512;  // of a chunk: a panel of it stays in the first cache, all panels in the last
constexpr std::int64_t kRows = 64;     // of the weight: what they carry through a loop stays in the second cache

}  // namespace

void gram(const Tier& tier, const std::uint16_t* x, std::int64_t m, std::int64_t k, std::int64_t stride, float* sum) {
    const std::int64_t panels = (k + kGramColumns - 1) / kGramColumns;
    const std::int64_t panel_size = std::min((m + 1) / 2, kTokens / 2) * kGramColumns;
    std::vector<std::uint32_t> packed(panels * panel_size);
#pragma omp parallel
    for (std::int64_t start = 0; start < m; start += kTokens) {
        const std::int64_t tokens = std::min(kTokens, m - start);
#pragma omp for
        for (std::int64_t p = 0; p < panels; ++p)
            tier.gram->pack(x + start * stride + p * kGramColumns, tokens, stride, k - p * kGramColumns,
                            packed.data() + p * panel_size);
#pragma omp for schedule(dynamic)
        for (std::int64_t p = 0; p < panels; ++p)
            tier.gram->multiply(packed.data() + p * panel_size, panel_size, (tokens + 1) / 2, panels - p,
                                k - p * kGramColumns, sum + p * kGramColumns * (k + 1), k);
    }
}

void columns(const Tier& tier, const Columns& loop, std::int64_t n) {
#pragma omp parallel for schedule(dynamic)
    for (std::int64_t start = 0; start < n; start += kRows) tier.columns(loop, start, std::min(n, start + kRows), n);
}

}  // namespace vllm_sparse::cpu
