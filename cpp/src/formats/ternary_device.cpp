// What the host does where a device encodes `ternary` matrices (cuda/ternary/encode.cu): the spec, and all of the record
// but the words.
#include <algorithm>
#include <vector>

#include "cpu/pool.h"
#include "formats/ternary_spec.h"
#include "qmoe/crc32c.h"
#include "qmoe/cuda_library.h"
#include "record_head.h"

namespace qmoe::cuda {
namespace {

Status check_matrices(const TernaryMatrices& in) noexcept {
    if (in.matrices == 0 || in.rows == 0 || in.cols == 0) return Status::error(Code::kShape, "ternary: empty matrices");
    if (in.matrices > kMaxExperts)
        return Status::mismatch(Code::kLimit, "record: too many experts", 0, kMaxExperts, in.matrices);
    if (in.rows > kMaxDim || in.cols > kMaxDim)
        return Status::mismatch(Code::kLimit, "record: too many rows or columns", 0, kMaxDim,
                                std::max(in.rows, in.cols));
    const uint64_t rows = in.matrices * in.rows;
    if (in.levels.size() != rows && in.levels.size() != 2 * rows)
        return Status::mismatch(Code::kShape, "ternary: number of levels", 0, 2 * rows, in.levels.size());
    return {};
}

std::vector<MatrixInput> inputs_of(const TernaryMatrices& in) {
    const size_t each = in.levels.size() / in.matrices;
    std::vector<MatrixInput> inputs(in.matrices);
    for (uint64_t e = 0; e < in.matrices; ++e) {
        inputs[e].format = kTernaryId;
        inputs[e].rows = in.rows, inputs[e].cols = in.cols;
        inputs[e].levels = in.levels.subspan(e * each, each);
    }
    return inputs;
}

// Of a matrix with so many words.
uint64_t padded_bytes(const TernaryLayout& layout, uint64_t words) noexcept {
    return ceil_div(layout.payload_at + 2 * words, uint64_t{kRecordAlign}) * kRecordAlign;
}

Status check_offsets(const TernaryLayout& layout, uint64_t matrices, std::span<const uint32_t> offsets) noexcept {
    const uint64_t each = layout.blocks + 1;
    if (offsets.size() != matrices * each)
        return Status::mismatch(Code::kShape, "ternary: block offsets", 0, matrices * each, offsets.size());
    for (uint64_t i = 0; i < offsets.size(); ++i)
        if (i % each == 0 ? offsets[i] != 0 : offsets[i] < offsets[i - 1])
            return Status::error(Code::kLimit, "ternary: payload over 8 GiB");
    return {};
}

}  // namespace

Status ternary_spec(const TernaryMatrices& in, std::span<const uint64_t> counts, SpecBytes& spec) {
    QMOE_TRY(check_matrices(in));
    if (counts.size() != kClasses + 1)
        return Status::mismatch(Code::kShape, "ternary: counts of symbols", 0, kClasses + 1, counts.size());
    if (counts[kClasses] != 0)
        return Status::mismatch(Code::kValue, "ternary: a trit is not -1, 0 or 1; symbols with one", 0, 0,
                                counts[kClasses]);
    const std::vector<MatrixInput> inputs = inputs_of(in);
    std::vector<const MatrixInput*> pointers;
    for (const MatrixInput& input : inputs) pointers.push_back(&input);
    QMOE_TRY(ternary_describe_levels(pointers, spec));
    TernaryCensus census;
    census.symbols = in.matrices * in.rows * ceil_div(in.cols, uint64_t{kTrits});
    census.weights = in.matrices * in.rows * in.cols;
    uint64_t zeros = census.symbols;  // of the first class
    for (uint32_t c = 1; c < kClasses; ++c) {
        if (counts[c] > zeros)
            return Status::mismatch(Code::kValue, "ternary: more symbols counted than there are", 0, zeros, counts[c]);
        census.count[c] = counts[c], zeros -= counts[c];
    }
    census.count[0] = zeros;
    ternary_describe_code(census, in.rows, in.cols, spec);
    return {};
}

uint64_t ternary_offsets(const SpecBytes& spec, uint64_t rows, uint64_t cols) noexcept {
    return TernaryLayout(spec.data(), rows, cols).blocks + 1;
}

Status ternary_places(const SpecBytes& spec, const TernaryMatrices& in, std::span<const uint32_t> offsets,
                      std::span<const uint32_t> misfits, std::vector<uint64_t>& first_words, uint64_t& bytes) {
    QMOE_TRY(check_ternary_spec(spec.data()));
    if (misfits.size() != in.matrices)
        return Status::mismatch(Code::kShape, "ternary: counts of misfits", 0, in.matrices, misfits.size());
    for (const uint32_t count : misfits)
        if (count != 0)
            return Status::mismatch(Code::kValue, "ternary: the spec is of other matrices; symbols that it cannot code",
                                    0, 0, count);
    const TernaryLayout layout(spec.data(), in.rows, in.cols);
    QMOE_TRY(check_offsets(layout, in.matrices, offsets));
    first_words.clear();
    bytes = 0;
    for (uint64_t e = 0; e < in.matrices; ++e) {
        first_words.push_back((bytes + layout.payload_at) / 2);
        bytes += padded_bytes(layout, offsets[(e + 1) * (layout.blocks + 1) - 1]);
    }
    return {};
}

uint64_t ternary_head_bytes(uint64_t matrices) noexcept {
    return record_head_bytes(1, matrices);
}

Status ternary_finish(const SpecBytes& spec, const TernaryMatrices& in, std::span<const uint32_t> offsets,
                      std::span<uint8_t> record, int threads) {
    QMOE_TRY(check_ternary_spec(spec.data()));
    QMOE_TRY(check_matrices(in));
    const TernaryLayout layout(spec.data(), in.rows, in.cols);
    QMOE_TRY(check_offsets(layout, in.matrices, offsets));
    const uint64_t head = ternary_head_bytes(in.matrices), each = layout.blocks + 1;
    std::vector<RecordEntry> entries(in.matrices);
    uint64_t at = head;
    for (uint64_t e = 0; e < in.matrices; ++e) {
        entries[e] = {at, padded_bytes(layout, offsets[(e + 1) * each - 1]), 0, 0};
        at += entries[e].bytes;
    }
    if (record.size() != at)
        return Status::mismatch(Code::kShape, "ternary: bytes of the record", 0, at, record.size());
    const std::vector<MatrixInput> inputs = inputs_of(in);
    parallel_for(in.matrices, threads, [&](uint64_t e) {
        uint8_t* const data = record.data() + entries[e].offset;
        ternary_put_levels(inputs[e], layout, data);
        std::memcpy(data + layout.offsets_at, offsets.data() + e * each, each * 4);
        entries[e].crc32c = crc32c({data, static_cast<size_t>(entries[e].bytes)});
    });
    std::fill_n(record.data(), head, uint8_t{0});
    write_record_head(record.data(), in.rows, in.cols, {&spec, 1}, entries, at);
    return {};
}

}  // namespace qmoe::cuda
