// The kernels of few_tokens.cuh for 8 bits.
#include "int/launch_few_tokens.cuh"

namespace qmoe::cuda {

QMOE_FEW_TOKENS(, 8)

}  // namespace qmoe::cuda
