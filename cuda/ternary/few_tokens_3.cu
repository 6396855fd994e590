// The kernels of few_tokens.cuh for symbols with gaps of 3 bits.
#include "ternary/few_tokens.cuh"

namespace qmoe::cuda {

QMOE_TERNARY_FEW_TOKENS(, 3)

}  // namespace qmoe::cuda
