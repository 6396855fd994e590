// The kernels of few_tokens.cuh for symbols with gaps of 6 bits.
#include "ternary/few_tokens.cuh"

namespace qmoe::cuda {

QMOE_TERNARY_FEW_TOKENS(, 6)

}  // namespace qmoe::cuda
