// From stored records to the run-time layout.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "cpu/pool.h"
#include "cpu/prepacked.h"
#include "formats/int.h"
#include "formats/ternary.h"
#include "qmoe/crc32c.h"

namespace qmoe {
namespace {

constexpr uint64_t kMagic = 0x324b434150455251;  // "QREPACK2"

struct Header {
    uint64_t magic, total;
    uint64_t experts, rows, cols;
    uint32_t order, crc;
    uint8_t zero[16];
};
static_assert(sizeof(Header) == 64);

uint64_t table_bytes(uint64_t experts) noexcept {
    return ceil_div(sizeof(Header) + experts * sizeof(Prepacked::Expert), kLine) * kLine;
}

uint32_t table_crc(const uint8_t* bytes, uint64_t experts) noexcept {
    Header header;
    std::memcpy(&header, bytes, sizeof header);
    header.crc = 0;
    const uint32_t first = crc32c({reinterpret_cast<const uint8_t*>(&header), sizeof header});
    return crc32c({bytes + sizeof header, experts * sizeof(Prepacked::Expert)}, first);
}

// Half precision where it loses nothing, which is so for stored float16 and for almost all bfloat16.
bool fits_half(float value) noexcept {
    return half_to_float(float_to_half(value)) == value;
}

Prepacked::Expert plan_int(const MatrixView& view) noexcept {
    const IntLayout layout(view.spec.data(), view.rows, view.cols);
    Prepacked::Expert e;
    // Steps of three bits are 32 columns, so groups of 16 are held in four.
    const bool widen = layout.bits == 3 && layout.group == kIntHalf;
    e.codes = layout.bits == 2             ? Codes::kInt2
              : layout.bits == 3 && !widen ? Codes::kInt3
              : layout.bits == 8           ? Codes::kInt8
                                           : Codes::kInt4;
    // A row of one group has chunks as long as they may be.
    e.chunk = layout.groups == 1 ? kMaxChunk : std::min(layout.group, kMaxChunk);
    e.repeat = layout.groups == 1 ? ~uint32_t{0} : layout.group / e.chunk;
    e.zeros = layout.has_zeros ? Zeros::kStored : Zeros::kConstant;
    e.offset = layout.offset + (layout.has_zeros ? 0.0f : static_cast<float>(1u << (layout.bits - 1)));
    bool half = true;
    for (uint64_t i = 0; half && i < layout.rows * layout.groups; ++i)
        half = fits_half(
            load_scale(view.data.data() + layout.scales_at + i * scale_bytes(layout.scale_type), layout.scale_type));
    e.scales = half ? Scales::kFloat16 : Scales::kFloat32;
    return e;
}

Prepacked::Expert plan_ternary(const MatrixView& view) noexcept {
    const TernaryLayout layout(view.spec.data(), view.rows, view.cols);
    Prepacked::Expert e;
    e.codes = layout.levels == 1 ? Codes::kInt2 : Codes::kTrits;
    e.scales = Scales::kFloat32;
    e.chunk = kMaxChunk;
    e.repeat = ~uint32_t{0};
    e.offset = layout.levels == 1 ? 1.0f : 0.0f;
    return e;
}

Status plan(const Record& record, RowOrder order, std::vector<Prepacked::Expert>& table, uint64_t& total) {
    if (order != RowOrder::kPlain && record.rows() % 2 != 0)
        return Status::mismatch(Code::kShape, "prepack: a gated projection has an even number of rows", 0,
                                record.rows() + 1, record.rows());
    table.clear();
    total = table_bytes(record.experts());
    const uint64_t panels = panels_of(record.rows(), order);
    for (uint64_t i = 0; i < record.experts(); ++i) {
        const MatrixView view = record.matrix(i);
        const uint16_t id = record.format_of(i).id;
        if (id != kIntId && id != kTernaryId)
            return Status::mismatch(Code::kNoKernel, "prepack: no kernel for this format", 0, kIntId, id);
        table.push_back(id == kIntId ? plan_int(view) : plan_ternary(view));
        table.back().at = total;
        total += panels / kUnitPanels * UnitSizes(table.back(), record.cols()).bytes;
    }
    return {};
}

// Codes of one stored row, one a byte.
void int_row_codes(const IntLayout& layout, const uint8_t* data, uint64_t row, uint8_t* out) noexcept {
    const uint8_t* block = data + row * layout.row_bytes;
    for (uint64_t k = 0; k < layout.cols; k += kIntBlock, block += layout.block_bytes) switch (layout.bits) {
            case 2:
            case 3:
                for (uint32_t part = 0; part < 4; ++part)
                    for (uint32_t i = 0; i < 8; ++i) {
                        uint32_t code = (block[i] >> (2 * part)) & 3u;
                        if (layout.bits == 3) code |= ((block[8 + part] >> i) & 1u) << 2;
                        out[k + 8 * part + i] = static_cast<uint8_t>(code);
                    }
                break;
            case 4:
                for (uint32_t i = 0; i < 16; ++i) {
                    out[k + i] = block[i] & 15;
                    out[k + 16 + i] = block[i] >> 4;
                }
                break;
            default: std::memcpy(out + k, block, kIntBlock);
        }
}

// One row's share of a step: the codes of its quads (four of them in a word) to one word a line.
void pack_step(Codes codes, const uint8_t* quads, uint8_t* line) noexcept {
    uint32_t q[8];
    std::memcpy(q, quads, step_cols(codes));
    switch (codes) {
        case Codes::kInt8: store(line, q[0]); return;
        case Codes::kInt4: store(line, q[0] | q[1] << 4); return;
        case Codes::kInt3:
            store(line, q[0] | q[1] << 3 | (q[6] & 0x03030303u) << 6);
            store(line + kLine, q[2] | q[3] << 3 | (q[7] & 0x03030303u) << 6);
            store(line + 2 * kLine, q[4] | q[5] << 3 | (q[6] & 0x04040404u) << 4 | (q[7] & 0x04040404u) << 5);
            return;
        default: store(line, q[0] | q[1] << 2 | q[2] << 4 | q[3] << 6);
    }
}

struct Target {
    const Prepacked::Expert& e;
    UnitSizes sizes;
    RowOrder order;
    uint64_t rows, panels;
    uint8_t* units;

    Target(const Prepacked::Expert& expert, const Record& record, RowOrder row_order, uint8_t* out) noexcept
        : e(expert),
          sizes(expert, record.cols()),
          order(row_order),
          rows(record.rows()),
          panels(panels_of(rows, row_order)),
          units(out + e.at) {}

    uint8_t* group_at(uint64_t panel, uint64_t group) const noexcept {
        return units + panel / kUnitPanels * sizes.bytes + group * sizes.group_bytes;
    }
    // Row r of a panel from its codes (padded_cols of them, zero beyond the last column).
    void put_codes(uint64_t panel, uint32_t r, const uint8_t* row) noexcept {
        const uint64_t first = sizes.meta + panel % kUnitPanels * step_lines(e.codes) * kLine + 4 * r;
        for (uint64_t group = 0, step = 0; group < sizes.groups; ++group) {
            uint8_t* line = group_at(panel, group) + first;
            const uint64_t end = std::min(step + sizes.group_steps, sizes.all_steps);
            for (; step < end; ++step, row += step_cols(e.codes), line += sizes.step_bytes)
                pack_step(e.codes, row, line);
        }
    }
    void put_scale(uint64_t panel, uint32_t r, uint64_t group, float value) noexcept {
        uint8_t* const at = group_at(panel, group) + panel % kUnitPanels * e.scale_bytes();
        if (e.scales == Scales::kFloat16)
            store(at + 2 * r, float_to_half(value));
        else
            store(at + 4 * r, value);
    }
    void put_zero(uint64_t panel, uint32_t r, uint64_t group, float value) noexcept {
        group_at(panel, group)[kUnitPanels * e.scale_bytes() + panel % kUnitPanels * kPanelRows + r] =
            static_cast<uint8_t>(value);
    }
};

void pack_int_panel(const MatrixView& view, Target& to, uint64_t panel, std::vector<uint8_t>& row) {
    const IntLayout layout(view.spec.data(), view.rows, view.cols);
    row.assign(std::max(to.sizes.padded_cols(to.e), ceil_div(view.cols, kIntBlock) * kIntBlock), 0);
    for (uint32_t r = 0; r < kPanelRows; ++r) {
        const uint64_t from = row_of(panel, r, to.rows, to.order);
        if (from == to.rows) continue;  // the bytes are zero: codes, scales and zeros
        int_row_codes(layout, view.data.data(), from, row.data());
        std::fill(row.begin() + static_cast<ptrdiff_t>(view.cols), row.end(), uint8_t{0});
        to.put_codes(panel, r, row.data());
        for (uint64_t g = 0; g < layout.groups; ++g) {
            to.put_scale(panel, r, g, layout.scale(view.data.data(), from, g));
            if (layout.has_zeros) to.put_zero(panel, r, g, layout.zero(view.data.data(), from, g) - layout.offset);
        }
    }
}

// A stored block's rows go to panels all over the stack, so a ternary matrix is one task.
void pack_ternary(const MatrixView& view, Target& to) {
    const TernaryLayout layout(view.spec.data(), view.rows, view.cols);
    const auto table = ternary_table(view.spec.data());
    const uint64_t stride = layout.padded_cols();
    std::vector<int8_t> trits(layout.rows_in_block(0) * stride);
    std::vector<uint8_t> row(std::max(stride, to.sizes.padded_cols(to.e)), 0);
    std::vector<uint64_t> place(view.rows);  // panel * 16 + r of every row
    for (uint64_t panel = 0; panel < to.panels; ++panel)
        for (uint32_t r = 0; r < kPanelRows; ++r)
            if (const uint64_t from = row_of(panel, r, to.rows, to.order); from < to.rows)
                place[from] = panel * kPanelRows + r;
    for (uint64_t block = 0; block < layout.blocks; ++block) {
        ternary_decode_block(layout, *table, view.data.data(), block, trits.data(), nullptr);
        for (uint64_t i = 0; i < layout.rows_in_block(block); ++i) {
            const uint64_t from = block * layout.block_rows + i, panel = place[from] / kPanelRows;
            const auto r = static_cast<uint32_t>(place[from] % kPanelRows);
            const int8_t* const t = trits.data() + i * stride;
            for (uint64_t k = 0; k < view.cols; ++k)
                row[k] = static_cast<uint8_t>(layout.levels == 1 ? t[k] + 1 : t[k] < 0 ? 2 : t[k]);
            to.put_codes(panel, r, row.data());
            const float high = layout.high(view.data.data(), from);
            to.put_scale(panel, r, 0, high);
            if (to.e.trits()) to.put_scale(panel, r + kPanelRows, 0, layout.low(view.data.data(), from));
        }
    }
}

}  // namespace

Status Prepacked::size(const Record& record, RowOrder order, uint64_t& bytes) noexcept {
    try {
        std::vector<Expert> table;
        return plan(record, order, table, bytes);
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "prepack: out of memory");
    }
}

Status Prepacked::prepack(const Record& record, RowOrder order, std::span<uint8_t> out, int threads) noexcept {
    try {
        std::vector<Expert> table;
        uint64_t total = 0;
        QMOE_TRY(plan(record, order, table, total));
        if (out.size() != total)
            return Status::mismatch(Code::kShape, "prepack: bytes of the output", 0, total, out.size());
        if (reinterpret_cast<uintptr_t>(out.data()) % kLine != 0)
            return Status::error(Code::kValue, "prepack: the output is not aligned to 64 bytes");
        Header header{kMagic, total, record.experts(), record.rows(), record.cols(), static_cast<uint32_t>(order),
                      0,      {}};
        std::memset(out.data(), 0, table_bytes(record.experts()));
        std::memcpy(out.data() + sizeof header, table.data(), table.size() * sizeof(Expert));
        std::memcpy(out.data(), &header, sizeof header);
        const uint64_t panels = panels_of(record.rows(), order);
        std::atomic<bool> failed{false};
        // Sixteen panels a task, a ternary expert a task.
        constexpr uint64_t kSome = 16;
        const uint64_t per_expert = ceil_div(panels, kSome);
        parallel_for(record.experts() * per_expert, threads, [&](uint64_t task) {
            const uint64_t expert = task / per_expert, first = task % per_expert * kSome;
            const MatrixView view = record.matrix(expert);
            Target to(table[expert], record, order, out.data());
            const bool ternary = record.format_of(expert).id == kTernaryId;
            if (ternary && first > 0) return;
            const uint64_t last = ternary ? panels : std::min(panels, first + kSome);
            std::memset(to.group_at(first, 0), 0, (last - first) / kUnitPanels * to.sizes.bytes);
            try {
                if (ternary) return pack_ternary(view, to);
                std::vector<uint8_t> row;
                for (uint64_t panel = first; panel < last; ++panel) pack_int_panel(view, to, panel, row);
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        });
        if (failed) return Status::error(Code::kNoSpace, "prepack: out of memory");
        header.crc = table_crc(out.data(), record.experts());
        std::memcpy(out.data(), &header, sizeof header);
        return {};
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "prepack: out of memory");
    }
}

Status Prepacked::open(std::span<const uint8_t> bytes, Prepacked& out) noexcept {
    if (bytes.size() < sizeof(Header))
        return Status::mismatch(Code::kTruncated, "prepacked: header", 0, sizeof(Header), bytes.size());
    if (reinterpret_cast<uintptr_t>(bytes.data()) % kLine != 0)
        return Status::error(Code::kValue, "prepacked: the bytes are not aligned to 64");
    Header header;
    std::memcpy(&header, bytes.data(), sizeof header);
    if (header.magic != kMagic) return Status::error(Code::kMagic, "prepacked: not prepacked weights");
    if (header.total != bytes.size())
        return Status::mismatch(Code::kTruncated, "prepacked: bytes", 0, header.total, bytes.size());
    if (header.experts > kMaxExperts || table_bytes(header.experts) > bytes.size() ||
        table_crc(bytes.data(), header.experts) != header.crc)
        return Status::error(Code::kChecksum, "prepacked: the table has changed");
    out.bytes_ = bytes;
    out.experts_ = header.experts;
    out.rows_ = header.rows;
    out.cols_ = header.cols;
    out.order_ = static_cast<RowOrder>(header.order);
    return {};
}

const Prepacked::Expert& Prepacked::expert(uint64_t index) const noexcept {
    return *reinterpret_cast<const Expert*>(bytes_.data() + sizeof(Header) + index * sizeof(Expert));
}

}  // namespace qmoe
