// What goes into a record comes out of it, whatever the shape, the parameters and the statistics.
#include <algorithm>

#include "testing.h"

using namespace qmoe;
using test::Buffer, test::Matrix, test::Random;

namespace {

void check_values(const Record& record, const std::vector<Matrix>& matrices) {
    REQUIRE(record.experts() == matrices.size());
    for (size_t e = 0; e < matrices.size(); ++e) {
        const auto expected = matrices[e].values();
        std::vector<float> actual(expected.size());
        REQUIRE(record.decode_rows(e, 0, record.rows(), actual.data()).code == Code::kOk);
        REQUIRE(actual == expected);
    }
}

void check_round_trip(const std::vector<Matrix>& matrices) {
    const Buffer bytes = test::build(matrices);
    Record record;
    REQUIRE(Record::open(bytes, record).code == Code::kOk);
    REQUIRE(record.verify().code == Code::kOk);
    REQUIRE(record.rows() == matrices.front().rows);
    REQUIRE(record.cols() == matrices.front().cols);
    check_values(record, matrices);
    REQUIRE(test::build(matrices) == bytes);
}

constexpr uint64_t kShapes[][2] = {{1, 1},   {1, 2},    {2, 5},   {3, 6},   {5, 7},   {1, 31},   {4, 32},  {7, 33},
                                   {9, 63},  {8, 64},   {3, 65},  {31, 95}, {32, 96}, {33, 97},  {2, 127}, {6, 128},
                                   {5, 129}, {64, 190}, {65, 12}, {100, 1}, {1, 700}, {129, 257}};

}  // namespace

TEST_SUITE("round trip") {
    TEST_CASE("int: every combination of bits, group, zero points, half steps and scale type over ragged shapes") {
        Random random(10);
        for (const auto& [rows, cols] : kShapes)
            for (const uint8_t bits : std::initializer_list<uint8_t>{2, 3, 4, 8})
                for (const uint32_t group : {0u, 16u, 32u, 64u, 128u})
                    for (const bool zeros : {false, true})
                        for (const bool half_step : {false, true})
                            for (const auto type : {ScaleType::kFloat16, ScaleType::kBfloat16, ScaleType::kFloat32})
                                check_round_trip(
                                    {test::int_matrix(random, rows, cols, bits, group, zeros, type, half_step)});
    }

    TEST_CASE("ternary: both kinds of levels and all densities over ragged shapes") {
        Random random(11);
        for (const auto& [rows, cols] : kShapes)
            for (const uint32_t levels : {1u, 2u})
                for (const uint32_t zeros : {0u, 100u, 340u, 614u, 819u, 906u, 973u, 1015u, 1023u, 1024u})
                    check_round_trip({test::ternary_matrix(random, rows, cols, levels, zeros)});
    }

    TEST_CASE("ternary: long rows, cut into many segments") {
        Random random(12);
        for (const uint64_t cols : {4096u, 20000u, 100001u})
            check_round_trip({test::ternary_matrix(random, 3, cols, 2, 900)});
        check_round_trip({test::ternary_matrix(random, 1, 1 << 20, 1, 1000)});
    }

    TEST_CASE("ternary: a spec fitted to one expert codes another of opposite statistics") {
        Random random(13);
        Matrix dense = test::ternary_matrix(random, 40, 300, 2, 0),
               empty = test::ternary_matrix(random, 40, 300, 2, 1024);
        Matrix minus = empty;
        std::fill(minus.trits.begin(), minus.trits.end(), int8_t{-1});
        check_round_trip({dense, empty, minus});
        check_round_trip({empty, empty, empty, empty, empty, empty, empty, dense});
    }

    TEST_CASE("ternary: patterns that repeat, single nonzeros, and zeros that fill all but the last column") {
        Random random(14);
        Matrix m = test::ternary_matrix(random, 33, 131, 2, 1024);
        for (const size_t period : {2u, 3u, 5u, 6u, 7u, 131u, 33u * 131u}) {
            for (size_t i = 0; i < m.trits.size(); ++i)
                m.trits[i] = i % period != period - 1 ? int8_t{0} : i % 2 == 0 ? int8_t{1} : int8_t{-1};
            check_round_trip({m});
        }
    }

    TEST_CASE("records of many experts of any formats; slices equal records built from those experts") {
        for (uint64_t seed = 0; seed < 120; ++seed) {
            CAPTURE(seed);
            Random random(1000 + seed);
            const uint64_t rows = 1 + random.below(70), cols = 1 + random.below(200), experts = 1 + random.below(9);
            std::vector<Matrix> matrices;
            for (uint64_t e = 0; e < experts; ++e)
                // Half of the experts repeat the parameters of an earlier one, so that specs are shared.
                matrices.push_back(e > 0 && random.below(2) == 0 ? matrices[random.below(e)]
                                                                 : test::random_matrix(random, rows, cols));
            check_round_trip(matrices);

            const Buffer bytes = test::build(matrices);
            Record record;
            REQUIRE(Record::open(bytes, record).code == Code::kOk);
            const uint64_t first = random.below(experts), count = 1 + random.below(experts - first);
            const std::vector<Matrix> part(matrices.begin() + static_cast<ptrdiff_t>(first),
                                           matrices.begin() + static_cast<ptrdiff_t>(first + count));
            Buffer slice;
            REQUIRE(record.slice_experts(first, count, slice).code == Code::kOk);
            Record sliced;
            REQUIRE(Record::open(slice, sliced).code == Code::kOk);
            REQUIRE(sliced.verify().code == Code::kOk);
            check_values(sliced, part);
            // Slicing a slice is slicing once.
            Buffer once, twice;
            REQUIRE(record.slice_experts(first + count - 1, 1, once).code == Code::kOk);
            REQUIRE(sliced.slice_experts(count - 1, 1, twice).code == Code::kOk);
            REQUIRE(once == twice);
        }
    }

    TEST_CASE("a slice of int experts is byte for byte the record built from them") {
        Random random(15);
        std::vector<Matrix> matrices;
        for (int e = 0; e < 5; ++e)
            matrices.push_back(test::int_matrix(random, 6, 70, e % 2 == 0 ? 4 : 2, 32, true, ScaleType::kFloat16));
        const Buffer bytes = test::build(matrices);
        Record record;
        REQUIRE(Record::open(bytes, record).code == Code::kOk);
        Buffer slice;
        REQUIRE(record.slice_experts(1, 3, slice).code == Code::kOk);
        CHECK(slice == test::build({matrices[1], matrices[2], matrices[3]}));
    }

    TEST_CASE("records joined hold the matrices of all; of int ones it is the record built of them at once") {
        for (uint64_t seed = 0; seed < 60; ++seed) {
            CAPTURE(seed);
            Random random(3000 + seed);
            const uint64_t rows = 1 + random.below(70), cols = 1 + random.below(200), parts = 1 + random.below(4);
            const bool ints = random.below(2) == 0;
            std::vector<Matrix> all;
            std::vector<Buffer> bytes;
            for (uint64_t part = 0; part < parts; ++part) {
                std::vector<Matrix> some;
                for (uint64_t e = 0, count = 1 + random.below(4); e < count; ++e)
                    some.push_back(ints ? test::int_matrix(random, rows, cols, random.below(2) == 0 ? 4 : 2, 32, true,
                                                           ScaleType::kFloat16)
                                        : test::random_matrix(random, rows, cols));
                bytes.push_back(test::build(some));
                all.insert(all.end(), some.begin(), some.end());
            }
            std::vector<Record> records(parts);
            for (uint64_t part = 0; part < parts; ++part)
                REQUIRE(Record::open(bytes[part], records[part]).code == Code::kOk);
            Buffer joined;
            REQUIRE(join_records(records, joined).code == Code::kOk);
            for (const Record& part : records) {
                const auto matrices = part.bytes().subspan(part.entries().front().offset);
                joined.insert(joined.end(), matrices.begin(), matrices.end());
            }
            Record record;
            REQUIRE(Record::open(joined, record).code == Code::kOk);
            REQUIRE(record.verify().code == Code::kOk);
            check_values(record, all);
            if (ints) CHECK(joined == test::build(all));
        }
    }

    TEST_CASE("records of other shapes do not join, nor none at all") {
        Random random(16);
        const Buffer a = test::build({test::int_matrix(random, 6, 70, 4, 32, true, ScaleType::kFloat16)});
        const Buffer b = test::build({test::int_matrix(random, 7, 70, 4, 32, true, ScaleType::kFloat16)});
        const Buffer c = test::build({test::int_matrix(random, 6, 71, 4, 32, true, ScaleType::kFloat16)});
        std::vector<Record> records(3);
        REQUIRE(Record::open(a, records[0]).code == Code::kOk);
        REQUIRE(Record::open(b, records[1]).code == Code::kOk);
        REQUIRE(Record::open(c, records[2]).code == Code::kOk);
        Buffer out;
        CHECK(join_records(std::vector{records[0], records[1]}, out).code == Code::kShape);
        CHECK(join_records(std::vector{records[0], records[2]}, out).code == Code::kShape);
        CHECK(join_records({}, out).code == Code::kShape);
    }

    TEST_CASE("rows decode alone as they do together") {
        for (const Buffer& bytes : {test::small_int_record(), test::small_ternary_record()}) {
            Record record;
            REQUIRE(Record::open(bytes, record).code == Code::kOk);
            std::vector<float> all(record.rows() * record.cols());
            REQUIRE(record.decode_rows(1, 0, record.rows(), all.data()).code == Code::kOk);
            for (uint64_t first = 0; first < record.rows(); ++first)
                for (uint64_t count = 0; first + count <= record.rows(); count += 1 + count) {
                    std::vector<float> part(count * record.cols() + 1, -77.0f);
                    REQUIRE(record.decode_rows(1, first, count, part.data()).code == Code::kOk);
                    REQUIRE(std::equal(part.begin(), part.end() - 1,
                                       all.begin() + static_cast<ptrdiff_t>(first * record.cols())));
                    REQUIRE(part.back() == -77.0f);
                }
        }
    }
}
