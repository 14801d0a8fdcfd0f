#include "hopper_table.cuh"

namespace vllm_sparse::hopper {

Table fp8_table() { return table_of_8_bits<wgmma::E4m3>(); }

}  // namespace vllm_sparse::hopper
