// Opens libqmoe_cuda at run time. Needs no CUDA to build or to run.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "qmoe/format.h"
#include "qmoe/record.h"

namespace qmoe::cuda {

struct Api;

// The library's functions (qmoe/cuda.h), or null with the reason in words. Looked for once: at $QMOE_CUDA_LIBRARY if
// set, else beside the file that holds this code, else by the loader.
const Api* library(std::string& reason);

// The 4096-entry decoding table that the ternary kernels want in device memory (see FORMAT.md). E_UNKNOWN: not a
// ternary spec.
Status ternary_decoding_table(std::span<const uint8_t, kSpecBytes> spec, std::span<uint32_t> out) noexcept;

}  // namespace qmoe::cuda
