// See kernels.inc; the compiler flags of this instruction set are in CMakeLists.txt.
#define QMOE_ISA generic
#include "gptq/kernels.inc"
