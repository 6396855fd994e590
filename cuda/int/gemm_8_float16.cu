// Products of many tokens in float16 by codes of 8 bits.
#include "int/gemm.cuh"

namespace qmoe::cuda {

QMOE_INT_GEMM_OF(, __half, 8)

}  // namespace qmoe::cuda
