#include "hopper_table.cuh"

namespace vllm_sparse::hopper {

Table bf16_table() { return table_of_16_bits<wgmma::BFloat16>(); }

}  // namespace vllm_sparse::hopper
