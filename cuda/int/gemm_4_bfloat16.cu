// Products of many tokens in bfloat16 by codes of 4 bits.
#include "int/gemm.cuh"

namespace qmoe::cuda {

QMOE_INT_GEMM_OF(, __nv_bfloat16, 4)

}  // namespace qmoe::cuda
