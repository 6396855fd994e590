// The kernels of many_tokens.cuh for tiles of 256 tokens.
#include "ternary/many_tokens.cuh"

namespace qmoe::cuda {

QMOE_TERNARY_MANY_TOKENS(, 256)

}  // namespace qmoe::cuda
