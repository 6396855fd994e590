// Products of many tokens in float16 by codes of 4 bits.
#include "int/gemm.cuh"

namespace qmoe::cuda {

QMOE_INT_GEMM_OF(, __half, 4)

}  // namespace qmoe::cuda
