// Any payload decodes in bounds: to something, and always to the same something.
#include <algorithm>

#include "formats/ternary.h"
#include "formats/ternary_streams.h"
#include "qmoe/matmul.h"
#include "surgery.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer, test::Random;

namespace {

constexpr size_t kEntries = 64 + kSpecBytes, kGuard = 64;

// A ternary record whose payload is noise: of words, or of one bit repeated, or empty of ones.
Buffer garbage_record(Random& random, uint64_t rows, uint64_t cols) {
    const auto levels = static_cast<uint32_t>(1 + random.below(2));
    Buffer bytes = test::build(
        {test::ternary_matrix(random, rows, cols, levels, random.pick({0u, 300u, 700u, 900u, 1000u, 1024u}))});
    const auto data = static_cast<size_t>(test::get<uint64_t>(bytes, kEntries));
    const TernaryLayout layout(bytes.data() + 64, rows, cols);
    const auto words = test::get<uint32_t>(bytes, data + layout.offsets_at + layout.blocks * 4);
    const uint64_t style = random.below(4);
    for (size_t i = 0; i < words * size_t{2}; ++i) {
        uint8_t& byte = bytes[data + static_cast<size_t>(layout.payload_at) + i];
        byte = style == 0 ? uint8_t{0xFF} : style == 1 ? uint8_t{0} : static_cast<uint8_t>(random.next());
    }
    // Block boundaries anywhere that the structure allows: some blocks then run out of words, others keep some.
    if (random.below(2) == 0)
        for (uint64_t b = 1; b < layout.blocks; ++b) {
            const auto low = test::get<uint32_t>(bytes, data + layout.offsets_at + (b - 1) * 4) +
                             layout.live_groups(b - 1, 0) * layout.segments;
            const auto next = test::get<uint32_t>(bytes, data + layout.offsets_at + (b + 1) * 4);
            const auto most = next - layout.live_groups(b, 0) * layout.segments;
            if (low > most) continue;
            test::put<uint32_t>(bytes, data + static_cast<size_t>(layout.offsets_at + b * 4),
                                low + static_cast<uint32_t>(random.below(most - low + 1)));
        }
    test::repair_checksums(bytes);
    return bytes;
}

}  // namespace

TEST_SUITE("garbage") {
    TEST_CASE("10,000 ternary payloads of noise decode in bounds, between intact guards, to trits") {
        size_t strict_refusals = 0;
        for (uint64_t seed = 0; seed < 10000; ++seed) {
            CAPTURE(seed);
            Random random(seed);
            const uint64_t rows = 1 + random.below(80), cols = 1 + random.below(90);
            const Buffer bytes = garbage_record(random, rows, cols);
            Record record;
            REQUIRE(Record::open(bytes, record).code == Code::kOk);
            strict_refusals += record.verify().code == Code::kCorrupt;

            const MatrixView view = record.matrix(0);
            const TernaryLayout layout(view.spec.data(), rows, cols);
            const TernaryTable table(view.spec.data());
            const uint64_t block = random.below(layout.blocks);
            const size_t size = layout.rows_in_block(block) * layout.padded_cols();
            std::vector<int8_t> trits(size + 2 * kGuard, int8_t{77});
            ternary_decode_block(layout, table, view.data.data(), block, trits.data() + kGuard, nullptr);
            for (size_t i = 0; i < trits.size(); ++i) {
                const bool guard = i < kGuard || i >= kGuard + size;
                REQUIRE((guard ? trits[i] == 77 : trits[i] >= -1 && trits[i] <= 1));
            }

            std::vector<float> values(rows * cols + 2 * kGuard, 12345.0f), again(rows * cols);
            REQUIRE(record.decode_rows(0, 0, rows, values.data() + kGuard).code == Code::kOk);
            REQUIRE(record.decode_rows(0, 0, rows, again.data()).code == Code::kOk);
            for (size_t i = 0; i < kGuard; ++i)
                REQUIRE((values[i] == 12345.0f && values[values.size() - 1 - i] == 12345.0f));
            REQUIRE(std::equal(again.begin(), again.end(), values.begin() + kGuard));
            for (uint64_t r = 0; r < rows; ++r)
                for (uint64_t k = 0; k < cols; ++k) {
                    const float v = again[r * cols + k];
                    REQUIRE(
                        (v == 0.0f || v == layout.low(view.data.data(), r) || v == layout.high(view.data.data(), r)));
                }

            // What GPUs multiply by is the same.
            cuda::StreamsShape shape{};
            std::vector<uint8_t> streams;
            REQUIRE(cuda::ternary_streams_shape(record, shape).ok());
            REQUIRE(cuda::ternary_streams(record, shape, streams).ok());
            std::vector<int8_t> signs(rows * cols);
            std::vector<float> levels(2 * rows);
            const auto matrix = std::span(streams).subspan(static_cast<size_t>(test::get<uint64_t>(streams, 0)));
            ternary_streams_decode(TernaryStreams(shape), matrix, signs.data(), levels.data());
            for (size_t i = 0; i < signs.size(); ++i)
                REQUIRE(again[i] == (signs[i] == 0 ? 0.0f : levels[i / cols * 2 + (signs[i] > 0 ? 1 : 0)]));
        }
        // Noise is hardly ever a stream that an encoder writes, except where a matrix costs no bits at all.
        MESSAGE(strict_refusals, " of 10000 refused by verify");
        CHECK(strict_refusals > 5000);
    }

    TEST_CASE("int codes and zero points of noise decode to finite values") {
        for (uint64_t seed = 0; seed < 500; ++seed) {
            Random random(seed);
            const uint64_t rows = 1 + random.below(20), cols = 1 + random.below(200);
            const auto bits = random.pick({uint8_t{2}, uint8_t{3}, uint8_t{4}, uint8_t{8}});
            Buffer bytes =
                test::build({test::int_matrix(random, rows, cols, bits, random.pick({0u, 16u, 32u, 64u, 128u}), true,
                                              ScaleType::kFloat16, random.below(2) == 0)});
            const auto data = static_cast<size_t>(test::get<uint64_t>(bytes, kEntries));
            const size_t codes = rows * ((cols + 31) / 32) * 4 * bits;
            for (size_t i = 0; i < codes; ++i) bytes[data + i] = static_cast<uint8_t>(random.next());
            test::repair_checksums(bytes);
            Record record;
            REQUIRE(Record::open(bytes, record).code == Code::kOk);
            std::vector<float> out(rows * cols);
            REQUIRE(record.decode_rows(0, 0, rows, out.data()).code == Code::kOk);
            for (const float v : out) REQUIRE(std::abs(v) <= 255.5f * 8.0f);
        }
    }
}
