// The kernels of few_tokens.cuh for 3 bits.
#include "int/launch_few_tokens.cuh"

namespace qmoe::cuda {

QMOE_FEW_TOKENS(, 3)

}  // namespace qmoe::cuda
