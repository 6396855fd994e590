// See kernels.inc; the compiler flags of this instruction set are in CMakeLists.txt.
#define QMOE_ISA avx512
#include "gptq/kernels.inc"
