// The kernels of few_tokens.cuh for 4 bits.
#include "int/launch_few_tokens.cuh"

namespace qmoe::cuda {

QMOE_FEW_TOKENS(, 4)

}  // namespace qmoe::cuda
