// AVX-512 with BW, DQ, VL and VNNI: Cascade Lake and later, Zen 4 and later.
#include "avx512_vector.h"
#include "rows.h"
#include "select.h"

namespace vllm_sparse::cpu {

const Tier avx512_tier = {
    "avx512",
    128,  // vpdpbusd: activations unsigned, weights signed
    16,
    {VLLM_SPARSE_TILES_16(multiply_float, Avx512, Format::bf16),
     VLLM_SPARSE_TILES_16(multiply_float, Avx512, Format::fp16),
     VLLM_SPARSE_TILES_16(multiply_float, Avx512, Format::fp8),
     VLLM_SPARSE_TILES_16(multiply_float, Avx512, Format::w8a16),
     VLLM_SPARSE_TILES_16(multiply_float, Avx512, Format::w4a16),
     VLLM_SPARSE_TILES_16(multiply_pairs, Avx512, Format::int8),
     VLLM_SPARSE_TILES_16(multiply_pairs, Avx512, Format::w4a8)},
    nullptr,
    nullptr,
    range_of_row,
    pack_row,
    finish_rows,
    nullptr,
    avx512_columns,
};

}  // namespace vllm_sparse::cpu
