// What compression on a CPU spends its time in: the Hessian's products and the loops over columns.
#pragma once

#include <cstdint>

#include "panel.h"

namespace vllm_sparse::cpu {

// Adds x^T x to `sum` [k, k]: everything right of the diagonal, and of each 16 x 16 block on the diagonal all of it.
// x is bf16 [m, k] with rows `stride` elements apart; products are exact, sums float. Needs tier.gram.
void gram(const Tier& tier, const std::uint16_t* x, std::int64_t m, std::int64_t k, std::int64_t stride, float* sum);

// The loops of compress/sparsegpt.py, gptq.py and descent.py over `count` columns. Arrays are [count, n] with column j
// of the weight as row j; `square` [count, count] has rows `ld` elements apart. Need tier.columns.
void columns(const Tier& tier, const Columns& loop, std::int64_t n);

}  // namespace vllm_sparse::cpu
