// Multiplication by packed matrices on the CPU, straight from the stored bytes.
#pragma once

#include <cstdint>
#include <span>

#include "qmoe/record.h"
#include "qmoe/status.h"

namespace qmoe {

enum class ActivationType : uint8_t { kFloat32, kFloat16, kBfloat16 };

// y[t] = W_e x[t] for the rows t of x that belong to expert e: rows [offsets[e], offsets[e + 1]).
//
//   x        (tokens, K), row-major, of `type`
//   offsets  (E + 1) ascending row numbers within [0, tokens]
//   y        (tokens, N), row-major, of `type`; rows outside [offsets[0], offsets[E]) become zero
//
// float32 accumulation. Deterministic: the result does not depend on `threads`. The record must have been opened.
// E_SHAPE / E_VALUE: offsets do not ascend or leave [0, tokens].
Status grouped_linear(const Record& record, const void* x, ActivationType type, uint64_t tokens,
                      std::span<const int64_t> offsets, void* y, int threads) noexcept;

// The instruction sets that this machine offers and this build has kernels for, best first, e.g. {"avx512", "avx2",
// "generic"}. The environment variable QMOE_FORCE_ISA pins one of them.
std::span<const char* const> available_isas() noexcept;
// The one in use. Null when QMOE_FORCE_ISA names one that this machine or build does not have: then every kernel
// refuses.
const char* active_isa() noexcept;

}  // namespace qmoe
