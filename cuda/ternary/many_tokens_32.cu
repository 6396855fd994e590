// The kernels of many_tokens.cuh for tiles of 32 tokens.
#include "ternary/many_tokens.cuh"

namespace qmoe::cuda {

QMOE_TERNARY_MANY_TOKENS(, 32)

}  // namespace qmoe::cuda
