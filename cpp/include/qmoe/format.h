// Formats: how one weight matrix (rows = outputs, columns = inputs) is stored, and nothing about how it was chosen.
// Byte-exact description: cpp/FORMAT.md. Every format is one file in src/formats/ and one line in formats.def.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "qmoe/status.h"

namespace qmoe {

inline constexpr size_t kSpecBytes = 80;       // one stored spec: u16 format id, then the format's own fields
inline constexpr uint64_t kMaxDim = 1u << 24;  // rows and columns of one matrix

// Parameters shared by any number of matrices of a record, exactly as stored.
using SpecBytes = std::array<uint8_t, kSpecBytes>;

// One quantized matrix on its way into a record. Unused fields stay empty.
struct MatrixInput {
    uint16_t format = 0;          // id from formats.def
    uint64_t rows = 0, cols = 0;  // N, K
    // int
    uint8_t bits = 0;                // 2, 3, 4, 8
    uint32_t group = 0;              // columns per scale: 16, 32, 64, 128, or 0 = the whole row
    uint8_t scale_dtype = 0;         // ScaleType
    std::span<const uint8_t> codes;  // (N, K)
    std::span<const float> scales;   // (N, G), exactly representable in scale_dtype
    std::span<const uint8_t> zeros;  // (N, G), or empty: symmetric, zero = 2^(bits-1)
    bool half_step = false;          // zeros are half a step up, zero + 1/2; without them zero = 2^(bits-1) - 1/2
    // ternary
    std::span<const int8_t> trits;  // (N, K), each -1, 0 or 1
    std::span<const float> levels;  // (N, 1) [high] or (N, 2) [low, high], exactly representable in bfloat16
};

enum class ScaleType : uint8_t { kFloat16 = 1, kBfloat16 = 2, kFloat32 = 3 };

// A matrix inside a validated record.
struct MatrixView {
    std::span<const uint8_t, kSpecBytes> spec;
    std::span<const uint8_t> data;  // exactly the entry's bytes
    uint64_t rows = 0, cols = 0;    // N, K
};

// One line of formats.def. Plain function pointers: no static constructors, no virtual tables.
struct Format {
    uint16_t id;
    const char* name;
    // Chooses one spec that serves all `inputs` (a table shared by the experts of a layer, say).
    Status (*make_spec)(std::span<const MatrixInput* const> inputs, SpecBytes& spec, int threads);
    // Appends the encoded matrix, without padding.
    Status (*encode)(const MatrixInput& input, const SpecBytes& spec, std::vector<uint8_t>& out);
    // Structural check: after it, decode and the kernels stay in bounds whatever the payload holds. With `values`, also
    // refuses scales and levels that are not finite. O(number of blocks), with `values` O(number of scales).
    Status (*validate)(const MatrixView& view, bool values) noexcept;
    // Full check: decodes everything and refuses whatever an encoder would not have written. O(size).
    Status (*verify)(const MatrixView& view) noexcept;
    // The readable scalar decoder: rows [first, first + count) to float32, (count, K) row-major.
    Status (*decode_rows)(const MatrixView& view, uint64_t first, uint64_t count, float* out) noexcept;
};

// All formats, in the order of formats.def.
std::span<const Format* const> formats() noexcept;
const Format* find_format(uint16_t id) noexcept;

}  // namespace qmoe
