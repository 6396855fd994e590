// See kernels.inc; the compiler flags of this instruction set are in CMakeLists.txt.
#define QMOE_ISA neon
#include "cpu/kernels.inc"
