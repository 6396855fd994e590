#include "qmoe/record.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "bytes.h"
#include "cpu/pool.h"
#include "qmoe/checked.h"
#include "qmoe/crc32c.h"
#include "record_head.h"

namespace qmoe {
namespace {

// Header, 64 bytes:
//    0 "QMOE" | 4 u16 version | 6 u16 flags = 0 | 8 u32 experts | 12 u32 specs | 16 u64 rows | 24 u64 cols
//   32 u64 total bytes | 40 u32 CRC32C of header and tables with these four bytes zero | 44 zero ...
constexpr size_t kHeaderBytes = 64, kEntryBytes = 16, kCrcAt = 40;

uint64_t tables_end(uint64_t specs, uint64_t experts) noexcept {
    return kHeaderBytes + specs * kSpecBytes + experts * kEntryBytes;
}

uint32_t header_crc(std::span<const uint8_t> head) noexcept {
    const uint8_t zero[4] = {};
    const uint32_t before = crc32c(head.first(kCrcAt));
    return crc32c(head.subspan(kCrcAt + 4), crc32c(zero, before));
}

// Matrices that may share a spec: same format, same parameters.
bool same_parameters(const MatrixInput& a, const MatrixInput& b) noexcept {
    return a.format == b.format && a.bits == b.bits && a.group == b.group && a.scale_dtype == b.scale_dtype &&
           a.zeros.empty() == b.zeros.empty() && a.half_step == b.half_step && a.levels.size() == b.levels.size();
}

Status open_checked(std::span<const uint8_t> bytes, bool check_crc, std::vector<RecordEntry>& entries, uint64_t& rows,
                    uint64_t& cols, size_t& spec_count) {
    if (bytes.size() < kHeaderBytes)
        return Status::mismatch(Code::kTruncated, "record: shorter than its header", 0, kHeaderBytes, bytes.size());
    const uint8_t* const base = bytes.data();
    if (std::memcmp(base, "QMOE", 4) != 0) return Status::error(Code::kMagic, "record: does not begin with QMOE");
    const uint16_t version = load<uint16_t>(base + 4);
    if (version != kRecordVersion)
        return Status::mismatch(Code::kVersion, "record: version not supported", 4, kRecordVersion, version);
    if (load<uint16_t>(base + 6) != 0) return Status::error(Code::kUnknown, "record: unknown flag", 6);
    const uint64_t experts = load<uint32_t>(base + 8), specs = load<uint32_t>(base + 12);
    rows = load<uint64_t>(base + 16);
    cols = load<uint64_t>(base + 24);
    const uint64_t total = load<uint64_t>(base + 32);
    if (experts > kMaxExperts)
        return Status::mismatch(Code::kLimit, "record: too many experts", 8, kMaxExperts, experts);
    if (experts == 0) return Status::error(Code::kShape, "record: no experts", 8);
    if (specs > experts) return Status::mismatch(Code::kLimit, "record: more specs than experts", 12, experts, specs);
    if (rows > kMaxDim) return Status::mismatch(Code::kLimit, "record: too many rows", 16, kMaxDim, rows);
    if (cols > kMaxDim) return Status::mismatch(Code::kLimit, "record: too many columns", 24, kMaxDim, cols);
    if (rows == 0 || cols == 0) return Status::error(Code::kShape, "record: empty matrices", 16);
    const uint64_t head = tables_end(specs, experts);
    if (total > bytes.size())
        return Status::mismatch(Code::kTruncated, "record: ends before its declared size", 32, total, bytes.size());
    if (total < bytes.size())
        return Status::mismatch(Code::kOffset, "record: bytes after its declared size", total, total, bytes.size());
    if (head > total) return Status::mismatch(Code::kTruncated, "record: too short for its tables", 32, head, total);
    if (const uint32_t crc = header_crc(bytes.first(head)); crc != load<uint32_t>(base + kCrcAt))
        return Status::mismatch(Code::kChecksum, "record: header checksum", kCrcAt, load<uint32_t>(base + kCrcAt), crc);
    if (!all_zero(base + kCrcAt + 4, kHeaderBytes - kCrcAt - 4))
        return Status::error(Code::kUnknown, "record: reserved header bytes are not zero", kCrcAt + 4);

    for (uint64_t s = 0; s < specs; ++s) {
        const uint64_t at = kHeaderBytes + s * kSpecBytes;
        const uint16_t id = load<uint16_t>(base + at);
        if (find_format(id) == nullptr) return Status::mismatch(Code::kUnknown, "record: unknown format id", at, 0, id);
    }
    spec_count = specs;
    entries.resize(experts);
    const uint8_t* p = base + kHeaderBytes + specs * kSpecBytes;
    uint64_t expected = ceil_div(head, kRecordAlign) * kRecordAlign;
    if (expected > total || !all_zero(base + head, expected - head))
        return Status::error(Code::kOffset, "record: tables are not followed by aligned data", head);
    for (uint64_t e = 0; e < experts; ++e, p += kEntryBytes) {
        RecordEntry& entry = entries[e];
        entry = {load<uint64_t>(p), 0, load<uint32_t>(p + 8), load<uint32_t>(p + 12)};
        const uint64_t at = static_cast<uint64_t>(p - base);
        if (entry.spec >= specs)
            return Status::mismatch(Code::kUnknown, "record: spec index", at + 8, specs, entry.spec);
        if (e == 0 && entry.offset != expected)
            return Status::mismatch(Code::kOffset, "record: first matrix offset", at, expected, entry.offset);
        if (entry.offset % kRecordAlign != 0 || entry.offset > total)
            return Status::mismatch(Code::kOffset, "record: matrix offset outside the record", at, total, entry.offset);
        if (e > 0) {
            if (entry.offset <= entries[e - 1].offset)
                return Status::mismatch(Code::kOffset, "record: offsets do not ascend", at, entries[e - 1].offset,
                                        entry.offset);
            entries[e - 1].bytes = entry.offset - entries[e - 1].offset;
        }
    }
    if (total <= entries.back().offset)
        return Status::mismatch(Code::kOffset, "record: last matrix is empty", 32, entries.back().offset, total);
    entries.back().bytes = total - entries.back().offset;

    for (const RecordEntry& entry : entries) {
        const auto data = bytes.subspan(entry.offset, entry.bytes);
        if (check_crc)
            if (const uint32_t crc = crc32c(data); crc != entry.crc32c)
                return Status::mismatch(Code::kChecksum, "record: matrix checksum", entry.offset, entry.crc32c, crc);
        const uint8_t* spec = base + kHeaderBytes + entry.spec * kSpecBytes;
        const Status status =
            find_format(load<uint16_t>(spec))
                ->validate({std::span<const uint8_t, kSpecBytes>(spec, kSpecBytes), data, rows, cols}, check_crc);
        // A refusal of the spec itself points into the spec; everything else into the matrix.
        if (!status.ok())
            return status.shifted(status.code == Code::kUnknown ? kHeaderBytes + entry.spec * kSpecBytes
                                                                : entry.offset);
    }
    return {};
}

}  // namespace

uint64_t record_head_bytes(uint64_t specs, uint64_t experts) noexcept {
    return ceil_div(tables_end(specs, experts), kRecordAlign) * kRecordAlign;
}

void write_record_head(uint8_t* out, uint64_t rows, uint64_t cols, std::span<const SpecBytes> specs,
                       std::span<const RecordEntry> entries, uint64_t total) {
    std::memcpy(out, "QMOE", 4);
    store<uint16_t>(out + 4, kRecordVersion);
    store<uint32_t>(out + 8, static_cast<uint32_t>(entries.size()));
    store<uint32_t>(out + 12, static_cast<uint32_t>(specs.size()));
    store<uint64_t>(out + 16, rows);
    store<uint64_t>(out + 24, cols);
    store<uint64_t>(out + 32, total);
    uint8_t* p = out + kHeaderBytes;
    for (const SpecBytes& spec : specs) {
        std::memcpy(p, spec.data(), kSpecBytes);
        p += kSpecBytes;
    }
    for (const RecordEntry& entry : entries) {
        store<uint64_t>(p, entry.offset);
        store<uint32_t>(p + 8, entry.spec);
        store<uint32_t>(p + 12, entry.crc32c);
        p += kEntryBytes;
    }
    store<uint32_t>(out + kCrcAt, header_crc({out, static_cast<size_t>(p - out)}));
}

Status Record::open(std::span<const uint8_t> bytes, Record& out, bool check_crc) {
    try {
        Record record;
        QMOE_TRY(open_checked(bytes, check_crc, record.entries_, record.rows_, record.cols_, record.spec_count_));
        record.bytes_ = bytes;
        out = std::move(record);
        return {};
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "record: out of memory");
    }
}

std::span<const uint8_t, kSpecBytes> Record::spec(size_t index) const noexcept {
    return std::span<const uint8_t, kSpecBytes>(bytes_.data() + kHeaderBytes + index * kSpecBytes, kSpecBytes);
}

const Format& Record::format_of_spec(size_t index) const noexcept {
    return *find_format(load<uint16_t>(spec(index).data()));
}

MatrixView Record::matrix(uint64_t expert) const noexcept {
    const RecordEntry& entry = entries_[expert];
    return {spec(entry.spec), bytes_.subspan(entry.offset, entry.bytes), rows_, cols_};
}

Status Record::verify() const noexcept {
    for (uint64_t e = 0; e < experts(); ++e) {
        const RecordEntry& entry = entries_[e];
        if (const uint32_t crc = crc32c(bytes_.subspan(entry.offset, entry.bytes)); crc != entry.crc32c)
            return Status::mismatch(Code::kChecksum, "record: matrix checksum", entry.offset, entry.crc32c, crc);
        const Status status = format_of(e).verify(matrix(e));
        if (!status.ok()) return status.shifted(entry.offset);
    }
    return {};
}

Status Record::decode_rows(uint64_t expert, uint64_t first, uint64_t count, float* out) const noexcept {
    if (expert >= experts()) return Status::mismatch(Code::kValue, "record: no such expert", 0, experts(), expert);
    if (first > rows_ || count > rows_ - first)
        return Status::mismatch(Code::kValue, "record: rows out of range", 0, rows_, first + count);
    return format_of(expert).decode_rows(matrix(expert), first, count, out);
}

Status Record::slice_experts(uint64_t first, uint64_t count, std::vector<uint8_t>& out) const {
    if (count == 0 || first >= experts() || count > experts() - first)
        return Status::mismatch(Code::kValue, "record: experts out of range", 0, experts(), first + count);
    try {
        // Keep only the specs still in use, in their order, so that a slice equals a record built from these experts.
        std::vector<uint32_t> renumbered(spec_count_, UINT32_MAX);
        std::vector<SpecBytes> specs;
        std::vector<RecordEntry> entries(entries_.begin() + static_cast<ptrdiff_t>(first),
                                         entries_.begin() + static_cast<ptrdiff_t>(first + count));
        for (RecordEntry& entry : entries) {
            if (renumbered[entry.spec] == UINT32_MAX) {
                renumbered[entry.spec] = static_cast<uint32_t>(specs.size());
                std::copy_n(spec(entry.spec).data(), kSpecBytes, specs.emplace_back().data());
            }
            entry.spec = renumbered[entry.spec];
        }
        const uint64_t data_at = record_head_bytes(specs.size(), count);
        const uint64_t from = entries.front().offset, to = entries.back().offset + entries.back().bytes;
        out.assign(data_at, 0);
        out.insert(out.end(), bytes_.begin() + static_cast<ptrdiff_t>(from),
                   bytes_.begin() + static_cast<ptrdiff_t>(to));
        for (RecordEntry& entry : entries) entry.offset = entry.offset - from + data_at;
        write_record_head(out.data(), rows_, cols_, specs, entries, out.size());
        return {};
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "record: out of memory");
    }
}

Status join_records(std::span<const Record> records, std::vector<uint8_t>& head) {
    if (records.empty()) return Status::error(Code::kShape, "record: no experts");
    const uint64_t rows = records.front().rows(), cols = records.front().cols();
    uint64_t experts = 0;
    for (const Record& record : records) {
        if (record.rows() != rows) return Status::mismatch(Code::kShape, "records: rows", 0, rows, record.rows());
        if (record.cols() != cols) return Status::mismatch(Code::kShape, "records: columns", 0, cols, record.cols());
        experts += record.experts();
    }
    if (experts > kMaxExperts)
        return Status::mismatch(Code::kLimit, "record: too many experts", 0, kMaxExperts, experts);
    try {
        std::vector<SpecBytes> specs;
        std::vector<RecordEntry> entries;
        entries.reserve(experts);
        std::vector<uint32_t> renumbered;
        for (const Record& record : records) {
            renumbered.clear();
            for (size_t s = 0; s < record.spec_count(); ++s) {
                const auto same = [&](const SpecBytes& known) { return std::ranges::equal(known, record.spec(s)); };
                const auto found = std::find_if(specs.begin(), specs.end(), same);
                renumbered.push_back(static_cast<uint32_t>(found - specs.begin()));
                if (found == specs.end()) std::copy_n(record.spec(s).data(), kSpecBytes, specs.emplace_back().data());
            }
            for (RecordEntry entry : record.entries()) {
                entry.spec = renumbered[entry.spec];
                entries.push_back(entry);
            }
        }
        head.assign(record_head_bytes(specs.size(), experts), 0);
        uint64_t at = head.size();
        size_t e = 0;
        for (const Record& record : records) {
            const uint64_t from = record.entries().front().offset;
            for (const size_t end = e + record.experts(); e < end; ++e) entries[e].offset += at - from;
            at += record.bytes().size() - from;
        }
        write_record_head(head.data(), rows, cols, specs, entries, at);
        return {};
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "record: out of memory");
    }
}

Status build_record(std::span<const MatrixInput> inputs, std::vector<uint8_t>& out, int threads) {
    if (inputs.empty()) return Status::error(Code::kShape, "record: no experts");
    if (inputs.size() > kMaxExperts)
        return Status::mismatch(Code::kLimit, "record: too many experts", 0, kMaxExperts, inputs.size());
    const uint64_t rows = inputs.front().rows, cols = inputs.front().cols;
    if (rows == 0 || cols == 0) return Status::error(Code::kShape, "record: empty matrices");
    if (rows > kMaxDim || cols > kMaxDim)
        return Status::mismatch(Code::kLimit, "record: too many rows or columns", 0, kMaxDim, std::max(rows, cols));
    try {
        std::vector<std::vector<const MatrixInput*>> classes;
        std::vector<uint32_t> class_of(inputs.size());
        for (size_t e = 0; e < inputs.size(); ++e) {
            if (inputs[e].rows != rows || inputs[e].cols != cols)
                return Status::mismatch(Code::kShape, "record: matrices differ in shape; matrix", 0, 0, e);
            if (find_format(inputs[e].format) == nullptr)
                return Status::mismatch(Code::kUnknown, "record: unknown format id", 0, 0, inputs[e].format);
            const auto found = std::find_if(classes.begin(), classes.end(),
                                            [&](const auto& c) { return same_parameters(*c.front(), inputs[e]); });
            class_of[e] = static_cast<uint32_t>(found - classes.begin());
            if (found == classes.end()) classes.emplace_back();
            classes[class_of[e]].push_back(&inputs[e]);
        }
        std::vector<SpecBytes> specs(classes.size());
        for (size_t c = 0; c < classes.size(); ++c)
            QMOE_TRY(find_format(classes[c].front()->format)->make_spec(classes[c], specs[c], threads));

        // A few matrices at a time into bytes of their own, on any thread, and then, in order, into the record: memory
        // holds the record once.
        std::vector<RecordEntry> entries(inputs.size());
        out.assign(record_head_bytes(specs.size(), inputs.size()), 0);
        const size_t batch = 4 * static_cast<size_t>(std::max(threads, 1));
        for (size_t first = 0; first < inputs.size(); first += batch) {
            const size_t count = std::min(batch, inputs.size() - first);
            std::vector<std::vector<uint8_t>> encoded(count);
            std::vector<Status> statuses(count);
            parallel_for(count, threads, [&](uint64_t i) {
                try {
                    const size_t e = first + i;
                    statuses[i] = find_format(inputs[e].format)->encode(inputs[e], specs[class_of[e]], encoded[i]);
                    if (!statuses[i].ok()) return;
                    encoded[i].resize(ceil_div(encoded[i].size(), kRecordAlign) * kRecordAlign);
                    entries[e] = {0, encoded[i].size(), class_of[e], crc32c(encoded[i])};
                } catch (const std::bad_alloc&) {
                    statuses[i] = Status::error(Code::kNoSpace, "record: out of memory");
                }
            });
            for (size_t i = 0; i < count; ++i) {
                QMOE_TRY(statuses[i]);
                entries[first + i].offset = out.size();
                out.insert(out.end(), encoded[i].begin(), encoded[i].end());
                // Others will be about as large; what is reserved too much is never touched.
                if (first + i == 0) out.reserve(out.size() + encoded[0].size() * inputs.size() * 9 / 8);
            }
        }
        write_record_head(out.data(), rows, cols, specs, entries, out.size());
        return {};
    } catch (const std::bad_alloc&) {
        return Status::error(Code::kNoSpace, "record: out of memory");
    }
}

}  // namespace qmoe
