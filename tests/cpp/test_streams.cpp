// The layout of ternary matrices for GPUs: what is in it comes out of it, and a walk through it stays within its slots.
#include <algorithm>
#include <array>

#include "formats/ternary_streams.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer, test::Matrix, test::Random;

namespace {

std::span<const uint8_t> matrix_of(const std::vector<uint8_t>& streams, uint64_t experts, uint64_t e) {
    const auto offset = test::get<uint64_t>(streams, e * 8);
    const uint64_t end = e + 1 < experts ? test::get<uint64_t>(streams, (e + 1) * 8) : streams.size();
    REQUIRE(offset % 16 == 0);
    REQUIRE(end <= streams.size());
    return std::span(streams).subspan(offset, end - offset);
}

// The farthest slot that any lane of a kernel reads.
uint32_t farthest(const TernaryStreams& layout, std::span<const uint8_t> bytes) {
    uint32_t most = 0;
    const uint32_t bits = layout.gap_bits + 1;
    for (uint64_t at = 0; at < layout.padded_rows(); ++at) {
        const uint32_t count = load<uint32_t>(bytes.data() + at * 4) >> TernaryStreams::kRowBits;
        const uint64_t base = load<uint32_t>(bytes.data() + layout.bases_at + at / layout.group_rows * 4);
        for (uint32_t s = 0; s < layout.segments; ++s) {
            uint32_t next = load<uint16_t>(bytes.data() + layout.starts_at + (at * layout.segments + s) * 2);
            for (uint32_t k = s * count / layout.segments; k < (s + 1) * count / layout.segments; ++k) {
                std::array<uint32_t, 5> words{};  // one more, for symbols across the end of a word
                const uint64_t quad = layout.quads_at + (base + k * layout.group_rows + at % layout.group_rows) * 16;
                REQUIRE(quad + 16 <= bytes.size());
                for (uint32_t w = 0; w < 4; ++w) words[w] = load<uint32_t>(bytes.data() + quad + 4 * w);
                for (uint32_t i = 0; i < layout.symbols(); ++i) {  // as the kernel takes them apart
                    const uint32_t word = i * bits / 32, shift = i * bits % 32;
                    const uint64_t two = uint64_t{words[word]} << 32 | words[word + 1];
                    next += (static_cast<uint32_t>(two >> (32 - shift)) >> (32 - layout.gap_bits)) + 1;
                    most = std::max(most, next - 1);
                }
            }
        }
    }
    return most;
}

void check(const std::vector<Matrix>& matrices, const cuda::StreamsShape* forced = nullptr) {
    const Buffer bytes = test::build(matrices);
    Record record;
    REQUIRE(Record::open(bytes, record).ok());
    cuda::StreamsShape shape{};
    REQUIRE(cuda::ternary_streams_shape(record, shape).ok());
    if (forced != nullptr) shape.gap_bits = forced->gap_bits, shape.segments = forced->segments;
    std::vector<uint8_t> streams, again;
    REQUIRE(cuda::ternary_streams(record, shape, streams, 1).ok());
    REQUIRE(cuda::ternary_streams(record, shape, again, 3).ok());
    REQUIRE(streams == again);
    const TernaryStreams layout(shape);
    for (size_t e = 0; e < matrices.size(); ++e) {
        const Matrix& matrix = matrices[e];
        const auto part = matrix_of(streams, matrices.size(), e);
        std::vector<int8_t> trits(matrix.trits.size(), 5);
        std::vector<float> levels(2 * matrix.rows, 99.0f);
        ternary_streams_decode(layout, part, trits.data(), levels.data());
        REQUIRE(trits == matrix.trits);
        std::vector<float> values(trits.size());
        for (size_t i = 0; i < values.size(); ++i) {
            const float* const of_row = levels.data() + i / matrix.cols * 2;
            values[i] = trits[i] == 0 ? 0.0f : of_row[trits[i] > 0 ? 1 : 0];
        }
        REQUIRE(values == matrix.values());
        REQUIRE(farthest(layout, part) < layout.all_slots());
    }
}

}  // namespace

TEST_SUITE("streams") {
    TEST_CASE("all densities over ragged shapes") {
        Random random(21);
        for (const auto& [rows, cols] : std::initializer_list<std::array<uint64_t, 2>>{
                 {1, 1}, {3, 7}, {5, 8}, {33, 63}, {32, 64}, {7, 129}, {70, 700}, {9, 4097}})
            for (const uint32_t levels : {1u, 2u})
                for (const uint32_t zeros : {0u, 100u, 512u, 819u, 906u, 973u, 1015u, 1023u, 1024u})
                    check({test::ternary_matrix(random, rows, cols, levels, zeros)});
    }

    TEST_CASE("every shape of the layout") {
        Random random(22);
        for (uint32_t gap_bits = TernaryStreams::kMinGapBits; gap_bits <= TernaryStreams::kMaxGapBits; ++gap_bits)
            for (uint32_t segments = 1; segments <= 32; segments *= 2)
                for (const uint32_t zeros : {0u, 700u, 1000u, 1024u}) {
                    const cuda::StreamsShape forced{0, 0, gap_bits, segments};
                    check({test::ternary_matrix(random, 37, 611, 2, zeros)}, &forced);
                }
    }

    TEST_CASE("experts that differ in density have one shape, and rows that differ keep their order apart") {
        Random random(23);
        std::vector<Matrix> matrices;
        for (const uint32_t zeros : {906u, 0u, 1024u, 500u})
            matrices.push_back(test::ternary_matrix(random, 40, 300, 2, zeros));
        for (uint64_t row = 0; row < 40; row += 3)  // empty rows and full ones in one matrix
            std::fill_n(matrices[0].trits.begin() + static_cast<ptrdiff_t>(row * 300), 300, row % 2 == 0 ? 0 : 1);
        check(matrices);
    }

    TEST_CASE("random trits take what they should") {
        Random random(24);
        const Buffer bytes = test::build({test::ternary_matrix(random, 512, 4096, 1, 906)});
        Record record;
        REQUIRE(Record::open(bytes, record).ok());
        cuda::StreamsShape shape{};
        REQUIRE(cuda::ternary_streams_shape(record, shape).ok());
        CHECK(shape.gap_bits == 5);
        CHECK(shape.segments == 8);
        std::vector<uint8_t> streams;
        REQUIRE(cuda::ternary_streams(record, shape, streams).ok());
        CHECK(static_cast<double>(streams.size()) * 8 / (512 * 4096) < 0.81);
    }

    TEST_CASE("refusals") {
        Random random(25);
        Record record;
        const Buffer ints = test::small_int_record(), trits = test::small_ternary_record();
        cuda::StreamsShape shape{};
        std::vector<uint8_t> out;
        REQUIRE(Record::open(ints, record).ok());
        CHECK(cuda::ternary_streams_shape(record, shape).code == Code::kNoKernel);
        CHECK(cuda::ternary_streams(record, {record.rows(), record.cols(), 5, 8}, out).code == Code::kNoKernel);
        REQUIRE(Record::open(trits, record).ok());
        for (const cuda::StreamsShape& bad : {cuda::StreamsShape{40, 70, 2, 8}, cuda::StreamsShape{40, 70, 8, 8},
                                              cuda::StreamsShape{40, 70, 5, 3}, cuda::StreamsShape{40, 70, 5, 64}})
            CHECK(cuda::ternary_streams(record, bad, out).code == Code::kValue);
        CHECK(cuda::ternary_streams(record, {40, 71, 5, 8}, out).code == Code::kShape);
        const Buffer wide = test::build({test::ternary_matrix(random, 1, 65536, 1, 1000)});
        REQUIRE(Record::open(wide, record).ok());
        CHECK(cuda::ternary_streams_shape(record, shape).code == Code::kNoKernel);
    }
}
