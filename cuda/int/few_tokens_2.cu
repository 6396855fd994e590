// The kernels of few_tokens.cuh for 2 bits.
#include "int/launch_few_tokens.cuh"

namespace qmoe::cuda {

QMOE_FEW_TOKENS(, 2)

}  // namespace qmoe::cuda
