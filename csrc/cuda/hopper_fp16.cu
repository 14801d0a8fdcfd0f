#include "hopper_table.cuh"

namespace vllm_sparse::hopper {

Table fp16_table() { return table_of_16_bits<wgmma::Float16>(); }

}  // namespace vllm_sparse::hopper
