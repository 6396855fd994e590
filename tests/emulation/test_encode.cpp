// The encoder of `ternary` for GPUs, whose threads are emulated, against the CPU's.
#include <algorithm>
#include <utility>

#include "common.cuh"
#include "formats/ternary.h"
#include "testing.h"

using namespace qmoe;
using test::Matrix, test::Random;

namespace {

constexpr size_t kGuard = 8;

// A call and what it writes to, with patterns behind.
struct Call {
    cuda::TernaryEncode call{};
    std::vector<int8_t> trits;
    std::vector<uint8_t> tables;
    std::vector<uint32_t> offsets, misfits;
    std::vector<uint64_t> scratch;

    Call(const uint8_t* spec, const std::vector<Matrix>& matrices, uint64_t rows, uint64_t cols) {
        std::copy_n(spec, kSpecBytes, call.spec);
        for (const Matrix& matrix : matrices) trits.insert(trits.end(), matrix.trits.begin(), matrix.trits.end());
        REQUIRE(cuda::ternary_encoding_tables(std::span<const uint8_t, kSpecBytes>(call.spec), tables).ok());
        const TernaryLayout layout(spec, rows, cols);
        offsets.assign(matrices.size() * (layout.blocks + 1), 99), misfits.assign(matrices.size(), 99);
        call.trits = trits.data(), call.matrices = matrices.size(), call.rows = rows, call.cols = cols;
        call.tables = tables.data(), call.offsets = offsets.data(), call.misfits = misfits.data();
        REQUIRE(cuda::ternary_encode_scratch(call, &call.scratch_bytes).ok());
        scratch.assign(call.scratch_bytes / 8 + 1 + kGuard, 0xAAAAAAAAAAAAAAAA);
        call.scratch = scratch.data();
    }
    Status code() const { return cuda::code_ternary(call, nullptr); }
};

std::vector<uint64_t> census(const std::vector<int8_t>& trits, uint64_t cols) {
    std::vector<uint64_t> counts(kClasses + 1, 77);
    REQUIRE(cuda::census_ternary(trits.data(), trits.size() / cols, cols, counts.data(), nullptr).ok());
    return counts;
}

// The device's encoder makes the record, byte for byte; its census counts the classes of symbols.
void check_encoding(const Record& record, const std::vector<Matrix>& matrices) {
    const MatrixView first = record.matrix(0);
    std::vector<float> levels;
    std::vector<uint64_t> expected(kClasses + 1), first_words;
    for (const Matrix& matrix : matrices) {
        levels.insert(levels.end(), matrix.levels.begin(), matrix.levels.end());
        for (uint64_t r = 0; r < first.rows; ++r)
            for (uint64_t k = 0; k < first.cols; k += kTrits) {
                uint32_t plus = 0, minus = 0;
                for (uint64_t i = k; i < std::min(k + kTrits, first.cols); ++i)
                    plus += matrix.trits[r * first.cols + i] > 0, minus += matrix.trits[r * first.cols + i] < 0;
                ++expected[ternary_class(plus, minus)];
            }
    }
    expected[0] = 0;
    Call of(first.spec.data(), matrices, first.rows, first.cols);
    const std::vector<uint64_t> counts = census(of.trits, first.cols);
    CHECK(counts == expected);
    const cuda::TernaryMatrices about{matrices.size(), first.rows, first.cols, levels};
    SpecBytes spec;
    REQUIRE(cuda::ternary_spec(about, counts, spec).ok());
    CHECK(std::equal(spec.begin(), spec.end(), first.spec.begin()));

    REQUIRE(of.code().ok());
    uint64_t bytes = 0;
    REQUIRE(cuda::ternary_places(spec, about, of.offsets, of.misfits, first_words, bytes).ok());
    const uint64_t head = cuda::ternary_head_bytes(matrices.size());
    std::vector<uint8_t> made(head + bytes + kGuard);
    std::fill(made.begin(), made.begin() + static_cast<int64_t>(head), uint8_t{77});
    std::fill(made.end() - kGuard, made.end(), uint8_t{77});
    of.call.words = reinterpret_cast<uint16_t*>(made.data() + head), of.call.first_words = first_words.data();
    REQUIRE(cuda::words_ternary(of.call, nullptr).ok());
    for (size_t i = of.scratch.size() - kGuard; i < of.scratch.size(); ++i)
        REQUIRE(of.scratch[i] == 0xAAAAAAAAAAAAAAAA);
    for (size_t i = made.size() - kGuard; i < made.size(); ++i) REQUIRE(made[i] == 77);
    CHECK(cuda::ternary_finish(spec, about, of.offsets, made).code == Code::kShape);
    REQUIRE(cuda::ternary_finish(spec, about, of.offsets, {made.data(), made.size() - kGuard}).ok());
    CHECK(std::equal(record.bytes().begin(), record.bytes().end(), made.begin(), made.end() - kGuard));
    --of.call.scratch_bytes;
    CHECK(of.code().code == Code::kShape);
}

}  // namespace

TEST_SUITE("encoding") {
    TEST_CASE("it makes the CPU's bytes") {
        Random random(45);
        for (const auto& [rows, cols] : std::initializer_list<std::array<uint64_t, 2>>{
                 {1, 1}, {3, 7}, {37, 611}, {130, 64}, {5, 3000}, {1, 20000}})
            for (const uint32_t zeros : {0u, 500u, 906u, 1020u, 1024u})
                for (const uint32_t levels : {1u, 2u}) {
                    CAPTURE(rows);
                    CAPTURE(cols);
                    CAPTURE(zeros);
                    CAPTURE(levels);
                    const std::vector<Matrix> matrices = {test::ternary_matrix(random, rows, cols, levels, zeros),
                                                          test::ternary_matrix(random, rows, cols, levels, zeros)};
                    const test::Buffer bytes = test::build(matrices);
                    Record record;
                    REQUIRE(Record::open(bytes, record).ok());
                    check_encoding(record, matrices);
                }
    }

    TEST_CASE("matrices that differ share a spec, and symbols without slots are escaped") {
        Random random(46);
        const std::vector<Matrix> matrices = {
            test::ternary_matrix(random, 40, 500, 2, 1024), test::ternary_matrix(random, 40, 500, 2, 1000),
            test::ternary_matrix(random, 40, 500, 2, 1020), test::ternary_matrix(random, 40, 500, 2, 1023)};
        const test::Buffer bytes = test::build(matrices);
        Record record;
        REQUIRE(Record::open(bytes, record).ok());
        CHECK(load<uint16_t>(record.spec(0).data() + kEscapeFreqAt) > 0);
        check_encoding(record, matrices);
    }

    TEST_CASE("a spec of other matrices, and what is no trit, are told") {
        Random random(47);
        constexpr uint64_t kRows = 33, kCols = 100;
        std::vector<Matrix> sparse = {test::ternary_matrix(random, kRows, kCols, 1, 1024),
                                      test::ternary_matrix(random, kRows, kCols, 1, 1024)};
        const test::Buffer bytes = test::build(sparse);
        Record record;
        REQUIRE(Record::open(bytes, record).ok());
        const uint8_t* const spec = record.spec(0).data();
        const cuda::TernaryMatrices about{2, kRows, kCols, {}};
        SpecBytes own;
        std::copy_n(spec, kSpecBytes, own.begin());
        std::vector<uint64_t> first_words;
        uint64_t size = 0;

        sparse[1].trits[kCols + 7] = 1, sparse[1].trits[kCols + 8] = -1, sparse[1].trits[3 * kCols - 1] = 1;
        const Call others(spec, sparse, kRows, kCols);
        REQUIRE(others.code().ok());
        CHECK(others.misfits == std::vector<uint32_t>{0, 2});
        CHECK(cuda::ternary_places(own, about, others.offsets, others.misfits, first_words, size).code == Code::kValue);

        for (const int value : {2, -2, 127, -128}) {
            sparse[1] = sparse[0];
            sparse[0].trits[5] = static_cast<int8_t>(value);
            const Call none(spec, sparse, kRows, kCols);
            REQUIRE(none.code().ok());
            CHECK(none.misfits == std::vector<uint32_t>{1, 0});
            const std::vector<uint64_t> counts = census(none.trits, kCols);
            CHECK(counts[kClasses] == 1);
            CHECK(cuda::ternary_spec({2, kRows, kCols, std::vector<float>(2 * kRows, 1.0f)}, counts, own).code ==
                  Code::kValue);
            sparse[0] = sparse[1];
        }

        Call call(spec, sparse, kRows, kCols);
        call.call.rows = 0;
        CHECK(call.code().code == Code::kShape);
        const uint8_t segments = std::exchange(call.call.spec[kSegmentsAt], uint8_t{32});
        call.call.rows = kRows, call.call.cols = 7;  // two symbols
        CHECK(call.code().code == Code::kShape);
        call.call.cols = kCols, call.call.spec[kSegmentsAt] = segments, ++call.call.spec[kEscapeFreqAt];
        CHECK(call.code().code == Code::kUnknown);
        call.call.spec[0] = 1;
        CHECK(call.code().code == Code::kUnknown);
    }
}
