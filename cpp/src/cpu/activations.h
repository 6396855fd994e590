// Activations on their way into and out of kernels, which compute in float32; and the rows that belong to experts.
#pragma once

#include <span>

#include "qmoe/matmul.h"

namespace qmoe {

inline uint64_t activation_bytes(ActivationType type) noexcept {
    return type == ActivationType::kFloat32 ? 4 : 2;
}

// `count` values from element `at` of x on, as floats.
void load_row(const void* x, ActivationType type, uint64_t at, uint64_t count, float* out) noexcept;
// And back, rounded to nearest even.
void store_row(const float* from, uint64_t count, ActivationType type, void* y, uint64_t at) noexcept;

// Refuses offsets that are not `experts` + 1 ascending row numbers within [0, tokens].
Status check_offsets(uint64_t experts, uint64_t tokens, std::span<const int64_t> offsets) noexcept;

}  // namespace qmoe
