// Fuzz target: packed records. Every input is tried as it is and once more with its size and checksums put right, so
// that mutants reach the decoders and not just the checksum.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "fuzz.h"
#include "qmoe/matmul.h"
#include "support.h"
#include "surgery.h"

namespace qmoe::fuzz {

uint64_t accepted = 0;

std::vector<Buffer> seeds() {
    std::vector<Buffer> out = {test::small_int_record(), test::small_ternary_record()};
    test::Random random(40);
    for (int i = 0; i < 30; ++i) {
        const uint64_t rows = 1 + random.below(40), cols = 1 + random.below(150);
        std::vector<test::Matrix> matrices;
        for (uint64_t e = 0; e < 1 + random.below(3); ++e) matrices.push_back(test::random_matrix(random, rows, cols));
        out.push_back(test::build(matrices));
    }
    return out;
}

namespace {

void multiply(const Record& record) {
    constexpr uint64_t kTokens = 2;
    std::vector<int64_t> offsets(record.experts() + 1, kTokens);
    offsets[0] = 0;
    const std::vector<float> x(kTokens * record.cols(), 0.5f);
    std::vector<float> y(kTokens * record.rows());
    expect(grouped_linear(record, x.data(), ActivationType::kFloat32, kTokens, offsets, y.data(), 1).ok(),
           "two tokens refused");
    offsets.assign(offsets.size(), 0);
    offsets.back() = 1;
    expect(grouped_linear(record, x.data(), ActivationType::kFloat32, 1, offsets, y.data(), 1).ok(),
           "one token refused");
}

void use(const Record& record) {
    // Rows [0, 64) of every expert: hostile shapes are huge, and decoding is linear in the rows asked for.
    const uint64_t rows = std::min<uint64_t>(record.rows(), 64);
    const bool strict = record.verify().ok();
    if (record.cols() > (1u << 16) || record.experts() > 64) return;
    std::vector<float> values(rows * record.cols());
    for (uint64_t e = 0; e < record.experts(); ++e) {
        expect(record.decode_rows(e, 0, rows, values.data()).ok(), "an opened record does not decode");
        for (const float v : values) expect(!std::isnan(v), "a decoded value is NaN");
    }
    Buffer slice;
    const uint64_t last = record.experts() - 1;
    expect(record.slice_experts(last, 1, slice).ok(), "an opened record does not slice");
    Record sliced;
    expect(Record::open(slice, sliced).ok(), "a slice does not open");
    expect(!strict || sliced.verify().ok(), "a slice of a strict record is not strict");
    std::vector<float> again(values.size());
    expect(sliced.decode_rows(0, 0, rows, again.data()).ok(), "a slice does not decode");
    expect(values == again, "a slice decodes to other values");
    // Joined with itself, whatever its tables are.
    const std::vector<Record> twice = {record, record};
    Buffer joined;
    expect(join_records(twice, joined).ok(), "an opened record does not join");
    for (const Record& part : twice) {
        const auto matrices = part.bytes().subspan(part.entries().front().offset);
        joined.insert(joined.end(), matrices.begin(), matrices.end());
    }
    Record both;
    expect(Record::open(joined, both).ok(), "a joined record does not open");
    expect(!strict || both.verify().ok(), "a joined record of strict ones is not strict");
    if (record.rows() * record.cols() <= (1u << 18)) multiply(record);
}

bool try_one(const Buffer& bytes) {
    // Its own allocation of exactly this size, so that sanitizers notice a read past the end.
    const auto exact = std::make_unique<uint8_t[]>(bytes.size());
    std::copy(bytes.begin(), bytes.end(), exact.get());
    Record record;
    const Status status = Record::open({exact.get(), bytes.size()}, record);
    if (!status.ok()) {
        expect(status.what[0] != 0 && status.offset <= bytes.size() + 8, "a refusal without reason or place");
        return false;
    }
    use(record);
    return true;
}

}  // namespace
}  // namespace qmoe::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace qmoe::fuzz;
    Buffer bytes(data, data + size);
    bool opened = try_one(bytes);
    if (const uint64_t total = bytes.size(); total >= 40) std::memcpy(bytes.data() + 32, &total, sizeof total);
    qmoe::test::repair_checksums(bytes);
    opened |= try_one(bytes);
    accepted += opened;
    return 0;
}
