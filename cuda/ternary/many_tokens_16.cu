// The kernels of many_tokens.cuh for tiles of 16 tokens.
#include "ternary/many_tokens.cuh"

namespace qmoe::cuda {

QMOE_TERNARY_MANY_TOKENS(, 16)

}  // namespace qmoe::cuda
