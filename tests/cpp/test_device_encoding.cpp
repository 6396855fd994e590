// What the host does where a device encodes ternary matrices: all of a record but the words, which are another record's here.
#include <algorithm>

#include "formats/ternary.h"
#include "qmoe/cuda_library.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer, test::Matrix, test::Random;

namespace {

// Of symbols by class, as a device counts them.
std::vector<uint64_t> census(const std::vector<Matrix>& matrices, uint64_t cols) {
    std::vector<uint64_t> counts(kClasses + 1);
    for (const Matrix& matrix : matrices)
        for (uint64_t first = 0; first < matrix.trits.size(); first += cols)
            for (uint64_t k = 0; k < cols; k += kTrits) {
                const auto* const six = matrix.trits.data() + first + k;
                const auto count = static_cast<int64_t>(std::min<uint64_t>(kTrits, cols - k));
                const auto plus = std::count(six, six + count, 1), minus = std::count(six, six + count, -1);
                ++counts[ternary_class(static_cast<uint32_t>(plus), static_cast<uint32_t>(minus))];
            }
    counts[0] = 0;
    return counts;
}

}  // namespace

TEST_SUITE("device encoding") {
    TEST_CASE("spec, places and record are the CPU's encoder's") {
        Random random(3);
        for (int i = 0; i < 100; ++i) {
            CAPTURE(i);
            const uint64_t rows = 1 + random.below(200), cols = 1 + random.below(300), experts = 1 + random.below(6);
            const auto per_row = static_cast<uint32_t>(1 + random.below(2));
            std::vector<Matrix> matrices;
            std::vector<float> levels;
            for (uint64_t e = 0; e < experts; ++e) {
                matrices.push_back(
                    test::ternary_matrix(random, rows, cols, per_row, random.pick({300u, 906u, 1020u, 1024u})));
                levels.insert(levels.end(), matrices[e].levels.begin(), matrices[e].levels.end());
            }
            const Buffer expected = test::build(matrices);
            Record record;
            REQUIRE(Record::open(expected, record).ok());
            const cuda::TernaryMatrices about{experts, rows, cols, levels};
            SpecBytes spec;
            REQUIRE(cuda::ternary_spec(about, census(matrices, cols), spec).ok());
            REQUIRE(std::equal(spec.begin(), spec.end(), record.spec(0).begin()));

            const TernaryLayout layout(spec.data(), rows, cols);
            REQUIRE(cuda::ternary_offsets(spec, rows, cols) == layout.blocks + 1);
            std::vector<uint32_t> offsets(experts * (layout.blocks + 1)), misfits(experts);
            for (uint64_t e = 0; e < experts; ++e)
                std::memcpy(offsets.data() + e * (layout.blocks + 1), record.matrix(e).data.data() + layout.offsets_at,
                            (layout.blocks + 1) * 4);
            std::vector<uint64_t> first_words;
            uint64_t bytes = 0;
            REQUIRE(cuda::ternary_places(spec, about, offsets, misfits, first_words, bytes).ok());
            const uint64_t head = cuda::ternary_head_bytes(experts);
            REQUIRE(head + bytes == expected.size());
            Buffer made(expected.size());
            std::fill_n(made.begin(), head, uint8_t{0xA5});
            for (uint64_t e = 0; e < experts; ++e) {
                const uint8_t* const words = record.matrix(e).data.data() + layout.payload_at;
                const uint64_t count = offsets[(e + 1) * (layout.blocks + 1) - 1];
                std::copy_n(words, 2 * count, made.data() + head + 2 * first_words[e]);
            }
            REQUIRE(cuda::ternary_finish(spec, about, offsets, made, 1 + static_cast<int>(random.below(3))).ok());
            REQUIRE(made == expected);
        }
    }

    TEST_CASE("refusals") {
        const std::vector<float> levels(10, 1.0f);
        const cuda::TernaryMatrices about{2, 5, 7, levels};
        std::vector<uint64_t> counts(kClasses + 1);
        SpecBytes spec;
        REQUIRE(cuda::ternary_spec(about, counts, spec).ok());
        const auto refusal = [&](cuda::TernaryMatrices in) {
            SpecBytes out;
            return cuda::ternary_spec(in, counts, out).code;
        };
        CHECK(refusal({0, 5, 7, levels}) == Code::kShape);
        CHECK(refusal({2, 4, 7, levels}) == Code::kShape);
        CHECK(refusal({2, 5, kMaxDim + 1, levels}) == Code::kLimit);
        CHECK(refusal({kMaxExperts + 1, 5, 7, levels}) == Code::kLimit);
        std::vector<float> odd = levels;
        odd[9] = 1.0f + 1.0f / 4096;
        CHECK(refusal({2, 5, 7, odd}) == Code::kValue);
        counts[5] = 21;  // there are 20 symbols
        CHECK(refusal(about) == Code::kValue);
        counts[5] = 0, counts[kClasses] = 1;
        CHECK(refusal(about) == Code::kValue);
        counts.pop_back();
        CHECK(refusal(about) == Code::kShape);

        const uint64_t each = cuda::ternary_offsets(spec, 5, 7);
        std::vector<uint32_t> offsets(2 * each, 0), misfits(2);
        for (uint64_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<uint32_t>(i % each);
        std::vector<uint64_t> first_words;
        uint64_t bytes = 0;
        const auto places = [&] {
            return cuda::ternary_places(spec, about, offsets, misfits, first_words, bytes).code;
        };
        REQUIRE(places() == Code::kOk);
        std::vector<uint8_t> record(cuda::ternary_head_bytes(2) + bytes);
        CHECK(cuda::ternary_finish(spec, about, offsets, record).ok());
        record.pop_back();
        CHECK(cuda::ternary_finish(spec, about, offsets, record).code == Code::kShape);
        offsets[each] = 1;
        CHECK(places() == Code::kLimit);
        offsets[each] = 0, misfits[1] = 3;
        CHECK(places() == Code::kValue);
        misfits.pop_back();
        CHECK(places() == Code::kShape);
        misfits = {0, 0}, offsets.pop_back();
        CHECK(places() == Code::kShape);
        spec[0] = 1;
        std::vector<uint8_t> tables;
        CHECK(cuda::ternary_encoding_tables(spec, tables).code == Code::kUnknown);
        CHECK(places() == Code::kUnknown);
    }
}
