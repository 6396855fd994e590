#include "cpu/activations.h"

#include <cstring>

#include "half.h"

namespace qmoe {

void load_row(const void* x, ActivationType type, uint64_t at, uint64_t count, float* out) noexcept {
    switch (type) {
        case ActivationType::kFloat32:
            std::memcpy(out, static_cast<const float*>(x) + at, count * sizeof(float));
            return;
        case ActivationType::kFloat16:
            for (uint64_t i = 0; i < count; ++i) out[i] = half_to_float(static_cast<const uint16_t*>(x)[at + i]);
            return;
        case ActivationType::kBfloat16:
            for (uint64_t i = 0; i < count; ++i) out[i] = bfloat_to_float(static_cast<const uint16_t*>(x)[at + i]);
            return;
    }
}

void store_row(const float* from, uint64_t count, ActivationType type, void* y, uint64_t at) noexcept {
    switch (type) {
        case ActivationType::kFloat32: std::memcpy(static_cast<float*>(y) + at, from, count * sizeof(float)); return;
        case ActivationType::kFloat16:
            for (uint64_t i = 0; i < count; ++i) static_cast<uint16_t*>(y)[at + i] = float_to_half(from[i]);
            return;
        case ActivationType::kBfloat16:
            for (uint64_t i = 0; i < count; ++i) static_cast<uint16_t*>(y)[at + i] = float_to_bfloat(from[i]);
            return;
    }
}

Status check_offsets(uint64_t experts, uint64_t tokens, std::span<const int64_t> offsets) noexcept {
    if (offsets.size() != experts + 1)
        return Status::mismatch(Code::kShape, "linear: number of offsets", 0, experts + 1, offsets.size());
    for (size_t e = 0; e < offsets.size(); ++e)
        if (offsets[e] < (e == 0 ? 0 : offsets[e - 1]) || static_cast<uint64_t>(offsets[e]) > tokens)
            return Status::mismatch(Code::kValue, "linear: offsets do not ascend within the tokens; offset", 0, tokens,
                                    e);
    return {};
}

}  // namespace qmoe
