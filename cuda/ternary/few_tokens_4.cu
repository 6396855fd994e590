// The kernels of few_tokens.cuh for symbols with gaps of 4 bits.
#include "ternary/few_tokens.cuh"

namespace qmoe::cuda {

QMOE_TERNARY_FEW_TOKENS(, 4)

}  // namespace qmoe::cuda
