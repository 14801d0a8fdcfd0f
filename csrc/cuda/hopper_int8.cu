#include "hopper_table.cuh"

namespace vllm_sparse::hopper {

Table int8_table() { return table_of_8_bits<wgmma::Int8>(); }

}  // namespace vllm_sparse::hopper
