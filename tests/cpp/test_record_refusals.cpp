// One named test per refusal of packed records, each with the exact code. Offsets: cpp/FORMAT.md.
#include <limits>

#include "formats/ternary.h"
#include "surgery.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer, test::Matrix, test::Random;

namespace {

constexpr size_t kVersion = 4, kFlags = 6, kExperts = 8, kSpecs = 12, kRows = 16, kCols = 24, kTotal = 32,
                 kReserved = 44;
constexpr size_t kSpec = 64, kEntries = kSpec + kSpecBytes;  // of records with one spec

size_t data_at(const Buffer& bytes, size_t expert = 0) {
    return static_cast<size_t>(test::get<uint64_t>(bytes, kEntries + 16 * expert));
}

// The code with which a changed record is refused, its checksums put right again.
template <class Change>
Code refused(Buffer bytes, Change change) {
    change(bytes);
    test::repair_checksums(bytes);
    return test::open(bytes).code;
}
template <class T>
Code patched(const Buffer& bytes, size_t at, T value) {
    return refused(bytes, [&](Buffer& b) { test::put<T>(b, at, value); });
}

Code refused_input(const Matrix& matrix) {
    const MatrixInput input = matrix.input();
    Buffer out;
    return build_record({&input, 1}, out).code;
}

}  // namespace

TEST_SUITE("record refusals") {
    TEST_CASE("E_TRUNCATED: every length from nothing to one byte less") {
        for (const Buffer& bytes : {test::small_int_record(), test::small_ternary_record()})
            for (size_t n = 0; n < bytes.size(); ++n) {
                const Buffer part(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(n));
                REQUIRE(test::open(part).code == Code::kTruncated);
            }
    }
    TEST_CASE("E_TRUNCATED: the declared size ends inside the tables") {
        Buffer bytes = test::small_int_record();
        bytes.resize(kEntries + 8);
        test::put<uint64_t>(bytes, kTotal, bytes.size());
        CHECK(test::open(bytes).code == Code::kTruncated);
    }
    TEST_CASE("E_TRUNCATED: ternary data too short for its tables") {
        const Buffer bytes = test::small_ternary_record();
        // The second matrix begins right behind the first one's first bytes.
        CHECK(patched<uint64_t>(bytes, kEntries + 16, data_at(bytes) + 16) == Code::kTruncated);
    }
    TEST_CASE("E_MAGIC: another file's first bytes") {
        CHECK(patched<uint32_t>(test::small_int_record(), 0, 0x04034B50) == Code::kMagic);
        CHECK(test::open(Buffer(64, 0)).code == Code::kMagic);
    }
    TEST_CASE("E_VERSION: zero and the future") {
        CHECK(patched<uint16_t>(test::small_int_record(), kVersion, 0) == Code::kVersion);
        CHECK(patched<uint16_t>(test::small_int_record(), kVersion, 2) == Code::kVersion);
        CHECK(patched<uint16_t>(test::small_int_record(), kVersion, 0xFFFF) == Code::kVersion);
    }
    TEST_CASE("E_UNKNOWN: every flag bit of the header") {
        for (int bit = 0; bit < 16; ++bit)
            CHECK(patched<uint16_t>(test::small_int_record(), kFlags, static_cast<uint16_t>(1u << bit)) ==
                  Code::kUnknown);
    }
    TEST_CASE("E_UNKNOWN: reserved header bytes") {
        for (size_t at = kReserved; at < 64; ++at)
            CHECK(patched<uint8_t>(test::small_int_record(), at, 1) == Code::kUnknown);
    }
    TEST_CASE("E_UNKNOWN: format id, spec index") {
        CHECK(patched<uint16_t>(test::small_int_record(), kSpec, 0) == Code::kUnknown);
        CHECK(patched<uint16_t>(test::small_int_record(), kSpec, 999) == Code::kUnknown);
        CHECK(patched<uint32_t>(test::small_int_record(), kEntries + 8, 1) == Code::kUnknown);
        CHECK(patched<uint32_t>(test::small_int_record(), kEntries + 8, 0xFFFFFFFF) == Code::kUnknown);
    }
    TEST_CASE("E_UNKNOWN: int bits, scale type, flags, group and reserved bytes") {
        const Buffer bytes = test::small_int_record();
        for (const uint8_t bits : std::initializer_list<uint8_t>{0, 1, 5, 6, 7, 9, 16, 255})
            CHECK(patched<uint8_t>(bytes, kSpec + 2, bits) == Code::kUnknown);
        for (const uint8_t type : std::initializer_list<uint8_t>{0, 4, 255})
            CHECK(patched<uint8_t>(bytes, kSpec + 3, type) == Code::kUnknown);
        for (const uint8_t flags : std::initializer_list<uint8_t>{4, 5, 7, 128, 255})
            CHECK(patched<uint8_t>(bytes, kSpec + 4, flags) == Code::kUnknown);
        for (const uint32_t group : {1u, 8u, 15u, 17u, 33u, 48u, 256u, 0x80000000u})
            CHECK(patched<uint32_t>(bytes, kSpec + 8, group) == Code::kUnknown);
        for (size_t at = kSpec + 12; at < kEntries; ++at) CHECK(patched<uint8_t>(bytes, at, 1) == Code::kUnknown);
        // Known values that the data does not fit: zeros where padding belongs, and too few scales.
        CHECK(patched<uint8_t>(bytes, kSpec + 4, 2) == Code::kCorrupt);
        CHECK(patched<uint32_t>(bytes, kSpec + 8, 16) == Code::kShape);
    }
    TEST_CASE("E_UNKNOWN: ternary levels, segments, rows per lane, slots and reserved bytes") {
        const Buffer bytes = test::small_ternary_record();
        for (const uint8_t levels : std::initializer_list<uint8_t>{0, 3, 255})
            CHECK(patched<uint8_t>(bytes, kSpec + 2, levels) == Code::kUnknown);
        for (const uint8_t segments : std::initializer_list<uint8_t>{0, 3, 33, 64, 255})
            CHECK(patched<uint8_t>(bytes, kSpec + 3, segments) == Code::kUnknown);
        for (const uint16_t rows : std::initializer_list<uint16_t>{0, 4097, 0xFFFF})
            CHECK(patched<uint16_t>(bytes, kSpec + 4, rows) == Code::kUnknown);
        for (size_t at = kSpec + 8; at < kSpec + 66; at += 2) {
            const auto slots = test::get<uint16_t>(bytes, at);
            CHECK(patched<uint16_t>(bytes, at, static_cast<uint16_t>(slots + 1)) == Code::kUnknown);
            CHECK(patched<uint16_t>(bytes, at, 0xFFFF) == Code::kUnknown);
        }
        for (const size_t at : {6u, 7u, 72u, 79u}) CHECK(patched<uint8_t>(bytes, kSpec + at, 1) == Code::kUnknown);
        for (const size_t at : {kLevelBitsAt, kLevelBitsAt + 1})
            for (const uint8_t bits : std::initializer_list<uint8_t>{17, 32, 255})
                CHECK(patched<uint8_t>(bytes, kSpec + at, bits) == Code::kUnknown);
        Random random(23);
        const Buffer symmetric = test::build({test::ternary_matrix(random, 5, 70, 1, 500)});
        CHECK(patched<uint16_t>(symmetric, kSpec + kLevelBaseAt + 2, 1) == Code::kUnknown);
        CHECK(patched<uint8_t>(symmetric, kSpec + kLevelBitsAt + 1, 1) == Code::kUnknown);
    }
    TEST_CASE("E_LIMIT: experts, specs, rows and columns") {
        const Buffer bytes = test::small_int_record();
        CHECK(patched<uint32_t>(bytes, kExperts, static_cast<uint32_t>(kMaxExperts + 1)) == Code::kLimit);
        CHECK(patched<uint32_t>(bytes, kExperts, 0xFFFFFFFF) == Code::kLimit);
        CHECK(patched<uint32_t>(bytes, kSpecs, 3) == Code::kLimit);
        CHECK(patched<uint64_t>(bytes, kRows, kMaxDim + 1) == Code::kLimit);
        CHECK(patched<uint64_t>(bytes, kCols, std::numeric_limits<uint64_t>::max()) == Code::kLimit);
    }
    TEST_CASE("E_LIMIT: a few ternary bytes that would decode to very long lanes") {
        CHECK(patched<uint16_t>(test::small_ternary_record(), kSpec + 4, 4096) == Code::kLimit);
    }
    TEST_CASE("E_SHAPE: no experts, no rows, no columns") {
        const Buffer bytes = test::small_int_record();
        CHECK(patched<uint32_t>(bytes, kExperts, 0) == Code::kShape);
        CHECK(patched<uint64_t>(bytes, kRows, 0) == Code::kShape);
        CHECK(patched<uint64_t>(bytes, kCols, 0) == Code::kShape);
    }
    TEST_CASE("E_SHAPE: the data does not have the size of the shape, however large the shape's product") {
        const Buffer bytes = test::small_int_record();
        CHECK(patched<uint64_t>(bytes, kRows, 4) == Code::kShape);
        CHECK(patched<uint64_t>(bytes, kCols, 72) == Code::kShape);
        CHECK(refused(bytes, [](Buffer& b) {
                  test::put<uint64_t>(b, kRows, kMaxDim);
                  test::put<uint64_t>(b, kCols, kMaxDim);
              }) == Code::kShape);
    }
    TEST_CASE("E_SHAPE: a ternary segment beyond the last column") {
        CHECK(patched<uint8_t>(test::small_ternary_record(), kSpec + 3, 32) == Code::kShape);
    }
    TEST_CASE("E_OFFSET: bytes after the record") {
        Buffer bytes = test::small_int_record();
        bytes.push_back(0);
        CHECK(test::open(bytes).code == Code::kOffset);
    }
    TEST_CASE("E_OFFSET: a gap, an overlap, wrong order, misalignment, an offset outside") {
        const Buffer bytes = test::small_int_record();
        const uint64_t first = data_at(bytes, 0), second = data_at(bytes, 1);
        CHECK(patched<uint64_t>(bytes, kEntries, first + 16) == Code::kOffset);
        CHECK(patched<uint64_t>(bytes, kEntries, 0) == Code::kOffset);
        CHECK(patched<uint64_t>(bytes, kEntries + 16, first) == Code::kOffset);
        CHECK(patched<uint64_t>(bytes, kEntries + 16, 16) == Code::kOffset);
        CHECK(patched<uint64_t>(bytes, kEntries + 16, second + 1) == Code::kOffset);
        CHECK(patched<uint64_t>(bytes, kEntries + 16, bytes.size()) == Code::kOffset);
        CHECK(patched<uint64_t>(bytes, kEntries + 16, std::numeric_limits<uint64_t>::max() - 15) == Code::kOffset);
    }
    TEST_CASE("E_OFFSET: something between the tables and the data") {
        // One spec and one entry more than a multiple of 16 cannot happen, so the gap is made by declaring one expert
        // less.
        const Buffer bytes = test::small_int_record();
        CHECK(patched<uint32_t>(bytes, kExperts, 1) == Code::kOffset);
    }
    TEST_CASE("E_CHECKSUM: header, tables, and the data of every expert") {
        const Buffer bytes = test::small_int_record();
        for (const size_t at : {size_t{kRows}, size_t{40}, size_t{kSpec + 2}, size_t{kEntries + 12}, data_at(bytes, 0),
                                data_at(bytes, 1)}) {
            Buffer changed = bytes;
            changed[at] = static_cast<uint8_t>(changed[at] ^ 1);
            CHECK(test::open(changed).code == Code::kChecksum);
        }
    }
    TEST_CASE("E_CHECKSUM: verify finds changed data even where open was told not to look") {
        Buffer bytes = test::small_int_record();
        bytes[data_at(bytes)] ^= 1;
        Record record;
        REQUIRE(Record::open(bytes, record, false).code == Code::kOk);
        CHECK(record.verify().code == Code::kChecksum);
    }
    TEST_CASE("E_CORRUPT: a scale or level that is not finite, with its offset") {
        // 3 rows of 2 blocks of 16 bytes, then float16 scales.
        Buffer bytes = test::small_int_record();
        const size_t scale = data_at(bytes) + 3 * 32 + 2;
        test::put<uint16_t>(bytes, scale, 0x7C00);
        test::repair_checksums(bytes);
        const Status status = test::open(bytes);
        CHECK(status.code == Code::kCorrupt);
        CHECK(status.offset == scale);
        const Buffer ternary = test::small_ternary_record();
        // Patterns that begin at that of infinity.
        CHECK(patched<uint16_t>(ternary, kSpec + kLevelBaseAt, 0x7F80) == Code::kCorrupt);
        CHECK(patched<uint16_t>(ternary, kSpec + kLevelBaseAt + 2, 0xFF80) == Code::kCorrupt);
    }
    TEST_CASE("E_CORRUPT: padding behind a matrix") {
        Buffer bytes = test::small_int_record();
        CHECK(patched<uint8_t>(bytes, data_at(bytes, 1) - 1, 1) == Code::kCorrupt);
        bytes = test::small_ternary_record();
        Buffer changed = bytes;
        // The payload's last word is followed by padding in at least one of the two matrices of this record.
        bool found = false;
        for (const size_t at : {data_at(bytes, 1) - 1, bytes.size() - 1})
            found |= bytes[at] == 0 && patched<uint8_t>(bytes, at, 1) == Code::kCorrupt;
        CHECK(found);
    }
    TEST_CASE("E_CORRUPT: ternary block offsets that do not ascend from zero") {
        Random random(20);
        const Buffer bytes = test::build({test::ternary_matrix(random, 4000, 70, 2, 500)});
        const TernaryLayout layout(bytes.data() + kSpec, 4000, 70);
        const size_t offsets = data_at(bytes) + static_cast<size_t>(layout.offsets_at);
        CHECK(patched<uint32_t>(bytes, offsets, 1) == Code::kCorrupt);
        const auto second = test::get<uint32_t>(bytes, offsets + 8);
        REQUIRE(second > 0);
        CHECK(patched<uint32_t>(bytes, offsets + 4, second + 1) == Code::kCorrupt);
        CHECK(patched<uint32_t>(bytes, offsets + 4, 0) == Code::kCorrupt);
        CHECK(patched<uint32_t>(bytes, offsets + 4, 0xFFFFFFFF) == Code::kCorrupt);
    }
    TEST_CASE("E_CORRUPT, by verify: bits left over behind the last column and behind the zero points") {
        Random random(21);
        for (const uint8_t bits : std::initializer_list<uint8_t>{2, 3, 4, 8}) {
            Buffer bytes = test::build({test::int_matrix(random, 2, 33, bits, 0, true, ScaleType::kFloat16)});
            const size_t last_block = data_at(bytes) + 4u * bits;  // of row 0; its code 1 is no column
            bytes[last_block + 1] = 1;
            test::repair_checksums(bytes);
            Record record;
            REQUIRE(Record::open(bytes, record).code == Code::kOk);
            CHECK(record.verify().code == Code::kCorrupt);
        }
        Buffer bytes = test::build({test::int_matrix(random, 1, 32, 3, 0, true, ScaleType::kFloat16)});
        bytes[data_at(bytes) + 12 + 2] |= 0x80;  // one block, one scale, then a zero point of three bits
        test::repair_checksums(bytes);
        Record record;
        REQUIRE(Record::open(bytes, record).code == Code::kOk);
        CHECK(record.verify().code == Code::kCorrupt);
    }
    TEST_CASE("E_CORRUPT, by verify: a ternary stream that no encoder wrote") {
        Buffer bytes = test::small_ternary_record();
        const TernaryLayout layout(bytes.data() + kSpec, 40, 70);
        const size_t payload = data_at(bytes) + static_cast<size_t>(layout.payload_at);
        for (size_t i = 0; i < 8; ++i) bytes[payload + i] = static_cast<uint8_t>(bytes[payload + i] ^ 0x55);
        test::repair_checksums(bytes);
        Record record;
        REQUIRE(Record::open(bytes, record).code == Code::kOk);
        CHECK(record.verify().code == Code::kCorrupt);
    }
    TEST_CASE("E_CORRUPT, by verify: bits left over behind ternary levels") {
        Random random(24);
        Matrix m = test::ternary_matrix(random, 3, 70, 1, 500);
        m.levels = {1.0f, 1.5f, 1.25f};  // patterns that differ in 7 bits: 21 bits of 24
        Buffer bytes = test::build({m});
        const TernaryLayout layout(bytes.data() + kSpec, 3, 70);
        REQUIRE(layout.highs.bits * 3 % 8 != 0);
        bytes[data_at(bytes) + static_cast<size_t>(layout.highs.bytes(3)) - 1] |= 0x80;
        test::repair_checksums(bytes);
        Record record;
        REQUIRE(Record::open(bytes, record).code == Code::kOk);
        CHECK(record.verify().code == Code::kCorrupt);
    }
    TEST_CASE("E_VALUE: experts and rows that do not exist") {
        const Buffer bytes = test::small_int_record();
        Record record;
        REQUIRE(Record::open(bytes, record).code == Code::kOk);
        float out[40];
        Buffer slice;
        constexpr uint64_t top = std::numeric_limits<uint64_t>::max();
        CHECK(record.decode_rows(2, 0, 1, out).code == Code::kValue);
        CHECK(record.decode_rows(0, 3, 1, out).code == Code::kValue);
        CHECK(record.decode_rows(0, 1, top, out).code == Code::kValue);
        CHECK(record.slice_experts(2, 1, slice).code == Code::kValue);
        CHECK(record.slice_experts(1, top, slice).code == Code::kValue);
        CHECK(record.slice_experts(0, 0, slice).code == Code::kValue);
    }
    TEST_CASE("encoders: E_VALUE, E_SHAPE, E_UNKNOWN and E_LIMIT") {
        Random random(22);
        const Matrix good = test::int_matrix(random, 4, 40, 4, 32, true, ScaleType::kFloat16);
        const auto changed = [&](auto change) {
            Matrix m = good;
            change(m);
            return refused_input(m);
        };
        CHECK(changed([](Matrix&) {}) == Code::kOk);
        CHECK(changed([](Matrix& m) { m.codes[7] = 16; }) == Code::kValue);
        CHECK(changed([](Matrix& m) { m.zeros[0] = 16; }) == Code::kValue);
        CHECK(changed([](Matrix& m) { m.scales[3] = std::numeric_limits<float>::infinity(); }) == Code::kValue);
        CHECK(changed([](Matrix& m) { m.scales[3] = std::numeric_limits<float>::quiet_NaN(); }) == Code::kValue);
        CHECK(changed([](Matrix& m) { m.scales[3] = 1.0f / 3.0f; }) == Code::kValue);
        CHECK(changed([](Matrix& m) { m.scales[3] = 1e6f; }) == Code::kValue);
        CHECK(changed([](Matrix& m) { m.codes.pop_back(); }) == Code::kShape);
        CHECK(changed([](Matrix& m) { m.scales.pop_back(); }) == Code::kShape);
        CHECK(changed([](Matrix& m) { m.zeros.pop_back(); }) == Code::kShape);
        CHECK(changed([](Matrix& m) { m.rows = 0; }) == Code::kShape);
        CHECK(changed([](Matrix& m) { m.bits = 5; }) == Code::kUnknown);
        CHECK(changed([](Matrix& m) { m.group = 8; }) == Code::kUnknown);
        CHECK(changed([](Matrix& m) { m.group = 48; }) == Code::kUnknown);
        CHECK(changed([](Matrix& m) { m.group = 16; }) == Code::kShape);  // scales of groups of 32
        CHECK(changed([](Matrix& m) { m.cols = kMaxDim + 1; }) == Code::kLimit);

        Matrix ternary = test::ternary_matrix(random, 4, 40, 2, 500);
        ternary.trits[9] = 2;
        CHECK(refused_input(ternary) == Code::kValue);
        ternary.trits[9] = -2;
        CHECK(refused_input(ternary) == Code::kValue);
        ternary.trits[9] = 0;
        ternary.levels[3] = 1.001f;
        CHECK(refused_input(ternary) == Code::kValue);
        ternary.levels.resize(7);
        CHECK(refused_input(ternary) == Code::kShape);
        ternary.levels.assign(8, 1.0f);
        ternary.trits.pop_back();
        CHECK(refused_input(ternary) == Code::kShape);

        Buffer out;
        CHECK(build_record({}, out).code == Code::kShape);
        MatrixInput unknown = good.input();
        unknown.format = 77;
        CHECK(build_record({&unknown, 1}, out).code == Code::kUnknown);
        const Matrix wider = test::int_matrix(random, 4, 41, 4, 32, true, ScaleType::kFloat16);
        const MatrixInput both[] = {good.input(), wider.input()};
        CHECK(build_record(both, out).code == Code::kShape);
    }
}
