// The kernels of many_tokens.cuh for tiles of 128 tokens.
#include "ternary/many_tokens.cuh"

namespace qmoe::cuda {

QMOE_TERNARY_MANY_TOKENS(, 128)

}  // namespace qmoe::cuda
