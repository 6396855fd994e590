// `int`: uniform codes of 2, 3, 4 or 8 bits. weight = scale * (code - zero), one scale (and zero) per group of columns.
//
//   codes   rows x ceil(K/32) blocks of 32 codes, 4*bits bytes each; the last block of a row is filled with zero codes
//   scales  rows x G            float16, bfloat16 or float32
//   zeros   rows x ceil(G*bits/8) bytes, packed from the low bit up; absent: zero = 2^(bits-1)
//
// Blocks are planar, so that whole vectors of bytes unpack with one shift and one mask:
//
//            bit 7 6 5 4 3 2 1 0
//   4 bits:  byte j of 16:  [code j+16][code j]
//   2 bits:  byte j of 8:   [j+24][j+16][j+8][j]
//   3 bits:  the two low bits as in 2 bits (8 bytes), then bit 2 of code i as bit i of 4 bytes
//   8 bits:  byte j of 32:  code j
//
// Spec: u16 id | u8 bits | u8 scale type | u8 flags (1 = zeros stored, 2 = half steps) | 3 x 0 | u32 group (0 = whole
// row) | 0 ...
#include "formats/int.h"

#include <algorithm>
#include <cmath>

namespace qmoe {
namespace {

bool known_group(uint32_t group) noexcept {
    return group == 0 || group == kIntHalf || group == 32 || group == 64 || group == 128;
}
bool known_bits(uint32_t bits) noexcept {
    return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

Status check_spec(const uint8_t* spec) noexcept {
    if (!known_bits(spec[2])) return Status::error(Code::kUnknown, "int: bits must be 2, 3, 4 or 8", 2);
    if (spec[3] < 1 || spec[3] > 3) return Status::error(Code::kUnknown, "int: unknown scale type", 3);
    if (spec[4] > (kIntZeros | kIntHalfStep)) return Status::error(Code::kUnknown, "int: unknown flag", 4);
    if (!all_zero(spec + 5, 3) || !all_zero(spec + 12, kSpecBytes - 12))
        return Status::error(Code::kUnknown, "int: reserved spec bytes are not zero", 5);
    if (!known_group(load<uint32_t>(spec + 8)))
        return Status::error(Code::kUnknown, "int: group must be 0 (row), 16, 32, 64 or 128", 8);
    return {};
}

Status make_spec(std::span<const MatrixInput* const> inputs, SpecBytes& spec, int) {
    const MatrixInput& first = *inputs.front();
    spec = {};
    store<uint16_t>(spec.data(), kIntId);
    spec[2] = first.bits;
    spec[3] = first.scale_dtype;
    spec[4] = static_cast<uint8_t>((first.zeros.empty() ? 0 : kIntZeros) | (first.half_step ? kIntHalfStep : 0));
    store<uint32_t>(spec.data() + 8, first.group);
    return check_spec(spec.data());
}

void pack_block(const uint8_t* codes, uint32_t bits, uint8_t* out) noexcept {
    if (bits == 8) {
        std::memcpy(out, codes, 32);
    } else if (bits == 4) {
        for (int j = 0; j < 16; ++j) out[j] = static_cast<uint8_t>(codes[j] | (codes[j + 16] << 4));
    } else {
        for (int j = 0; j < 8; ++j)
            out[j] = static_cast<uint8_t>((codes[j] & 3) | ((codes[j + 8] & 3) << 2) | ((codes[j + 16] & 3) << 4) |
                                          ((codes[j + 24] & 3) << 6));
        if (bits == 3) {
            uint32_t plane = 0;
            for (uint32_t i = 0; i < 32; ++i) plane |= static_cast<uint32_t>(codes[i] >> 2) << i;
            store(out + 8, plane);
        }
    }
}

bool store_scale(uint8_t* p, ScaleType type, float value) noexcept {
    if (type == ScaleType::kFloat32) {
        store(p, value);
    } else {
        store<uint16_t>(p, type == ScaleType::kFloat16 ? float_to_half(value) : float_to_bfloat(value));
    }
    return load_scale(p, type) == value && std::isfinite(value);
}

Status encode(const MatrixInput& in, const SpecBytes& spec, std::vector<uint8_t>& out) {
    const IntLayout layout(spec.data(), in.rows, in.cols);
    if (in.codes.size() != in.rows * in.cols)
        return Status::mismatch(Code::kShape, "int: number of codes", 0, in.rows * in.cols, in.codes.size());
    if (in.scales.size() != in.rows * layout.groups)
        return Status::mismatch(Code::kShape, "int: number of scales", 0, in.rows * layout.groups, in.scales.size());
    if (layout.has_zeros && in.zeros.size() != in.scales.size())
        return Status::mismatch(Code::kShape, "int: number of zero points", 0, in.scales.size(), in.zeros.size());

    const size_t begin = out.size();
    out.resize(begin + layout.bytes);
    uint8_t* const base = out.data() + begin;
    const uint8_t limit = static_cast<uint8_t>((1u << layout.bits) - 1);
    for (uint64_t r = 0; r < in.rows; ++r) {
        const uint8_t* codes = in.codes.data() + r * in.cols;
        uint8_t* row = base + r * layout.row_bytes;
        uint8_t beyond = 0;
        for (uint64_t k = 0; k < in.cols; ++k) beyond |= codes[k] > limit;
        if (beyond) return Status::mismatch(Code::kValue, "int: a code does not fit its bits; row", r, limit, r);
        uint64_t k = 0;
        for (; k + kIntBlock <= in.cols; k += kIntBlock, row += layout.block_bytes)
            pack_block(codes + k, layout.bits, row);
        if (k < in.cols) {
            uint8_t tail[kIntBlock] = {};
            std::memcpy(tail, codes + k, in.cols - k);
            pack_block(tail, layout.bits, row);
        }
    }
    for (size_t i = 0; i < in.scales.size(); ++i)
        if (!store_scale(base + layout.scales_at + i * scale_bytes(layout.scale_type), layout.scale_type, in.scales[i]))
            return Status::error(Code::kValue, "int: a scale is not finite or not representable in its type", i);
    for (uint64_t r = 0; layout.has_zeros && r < in.rows; ++r)
        for (uint64_t g = 0; g < layout.groups; ++g) {
            const uint32_t zero = in.zeros[r * layout.groups + g];
            if (zero > limit)
                return Status::mismatch(Code::kValue, "int: a zero point does not fit its bits", r, limit, zero);
            const uint64_t bit = g * layout.bits;
            uint8_t* p = base + layout.zeros_at + r * layout.zero_row_bytes + bit / 8;
            const uint32_t shifted = zero << (bit % 8);
            p[0] = static_cast<uint8_t>(p[0] | shifted);
            if (shifted > 255) p[1] = static_cast<uint8_t>(p[1] | (shifted >> 8));
        }
    return {};
}

Status validate(const MatrixView& view, bool values) noexcept {
    QMOE_TRY(check_spec(view.spec.data()));
    const IntLayout layout(view.spec.data(), view.rows, view.cols);
    const uint64_t padded = ceil_div(layout.bytes, 16) * 16;
    if (view.data.size() != padded)
        return Status::mismatch(Code::kShape, "int: data size does not match the shape", 0, padded, view.data.size());
    if (!all_zero(view.data.data() + layout.bytes, padded - layout.bytes))
        return Status::error(Code::kCorrupt, "int: padding is not zero", layout.bytes);
    const uint32_t width = scale_bytes(layout.scale_type);
    for (uint64_t i = 0; values && i < layout.rows * layout.groups; ++i)
        if (!std::isfinite(load_scale(view.data.data() + layout.scales_at + i * width, layout.scale_type)))
            return Status::error(Code::kCorrupt, "int: a scale is not finite", layout.scales_at + i * width);
    return {};
}

Status verify(const MatrixView& view) noexcept {
    const IntLayout layout(view.spec.data(), view.rows, view.cols);
    const uint32_t filled = static_cast<uint32_t>(view.cols % kIntBlock);
    for (uint64_t r = 0; filled != 0 && r < view.rows; ++r) {
        const uint64_t at = (r + 1) * layout.row_bytes - layout.block_bytes;
        for (uint32_t i = filled; i < kIntBlock; ++i)
            if (int_code(view.data.data() + at, layout.bits, i) != 0)
                return Status::error(Code::kCorrupt, "int: bits left over after the last column of a row", at);
    }
    const uint32_t used = static_cast<uint32_t>(layout.groups * layout.bits % 8);
    for (uint64_t r = 0; layout.has_zeros && used != 0 && r < view.rows; ++r) {
        const uint64_t at = layout.zeros_at + (r + 1) * layout.zero_row_bytes - 1;
        if (view.data[at] >> used)
            return Status::error(Code::kCorrupt, "int: bits left over after the zero points", at);
    }
    return {};
}

Status decode_rows(const MatrixView& view, uint64_t first, uint64_t count, float* out) noexcept {
    const IntLayout layout(view.spec.data(), view.rows, view.cols);
    const uint8_t* const data = view.data.data();
    for (uint64_t r = first; r < first + count; ++r) {
        const uint8_t* row = data + r * layout.row_bytes;
        for (uint64_t g = 0; g < layout.groups; ++g) {
            const float scale = layout.scale(data, r, g);
            const float zero = layout.zero(data, r, g);
            const uint64_t end = std::min<uint64_t>((g + 1) * layout.group, layout.cols);
            for (uint64_t k = g * layout.group; k < end; ++k) {
                const uint32_t code = int_code(row + k / kIntBlock * layout.block_bytes, layout.bits, k % kIntBlock);
                *out++ = scale * (static_cast<float>(code) - zero);
            }
        }
    }
    return {};
}

}  // namespace

extern constinit const Format format_int{kIntId, "int", make_spec, encode, validate, verify, decode_rows};

}  // namespace qmoe
