// Deterministic mutation: flips of every bit, and every field set to hostile values with the checksums put right again.
#include "qmoe/matmul.h"
#include "surgery.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer, test::Random;

namespace {

std::vector<Buffer> samples() {
    std::vector<Buffer> out = {test::small_int_record(), test::small_ternary_record()};
    Random random(30);
    for (int i = 0; i < 6; ++i)
        out.push_back(test::build({test::random_matrix(random, 9, 70), test::random_matrix(random, 9, 70)}));
    return out;
}

// Decodes whatever opened. The sanitizers, where built in, watch the bounds.
void use(const Buffer& bytes) {
    const Buffer exact(bytes);  // its own allocation, so that reading past the end is noticed
    Record record;
    if (!Record::open(exact, record).ok()) return;
    static_cast<void>(record.verify());
    const uint64_t rows = std::min<uint64_t>(record.rows(), 64);
    if (record.cols() > (1u << 16)) return;
    std::vector<float> out(rows * record.cols());
    for (uint64_t e = 0; e < record.experts(); ++e) static_cast<void>(record.decode_rows(e, 0, rows, out.data()));
}

}  // namespace

TEST_SUITE("mutation") {
    TEST_CASE("every flip of one bit, anywhere in a record, is refused") {
        size_t flips = 0;
        for (const Buffer& original : samples()) {
            Buffer bytes = original;
            for (size_t bit = 0; bit < bytes.size() * 8; ++bit, ++flips) {
                bytes[bit / 8] = static_cast<uint8_t>(bytes[bit / 8] ^ (1u << (bit % 8)));
                const Status status = test::open(bytes);
                // Between the tables and the data there is padding, which no checksum covers but which must be zero.
                REQUIRE(status.code != Code::kOk);
                bytes[bit / 8] = static_cast<uint8_t>(bytes[bit / 8] ^ (1u << (bit % 8)));
            }
            REQUIRE(bytes == original);
        }
        MESSAGE(flips, " bit flips refused");
    }

    TEST_CASE("every field of header, specs and entries set to hostile values") {
        constexpr uint64_t kHostile[] = {0,          1,          2,          0x7F,       0x80,       0xFF,
                                         0x7FFF,     0xFFFF,     0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x1'0000'0000,
                                         1ull << 42, 1ull << 62, 1ull << 63, ~0ull - 15, ~0ull - 1,  ~0ull};
        size_t tried = 0;
        for (const Buffer& original : samples()) {
            const size_t head = static_cast<size_t>(64 + 80 * test::get<uint32_t>(original, 12) +
                                                    16 * test::get<uint32_t>(original, 8));
            for (size_t at = 0; at < head; ++at)
                for (const uint64_t value : kHostile)
                    for (const size_t width : {1u, 2u, 4u, 8u}) {
                        if (at % width != 0 || at + width > head || (width < 8 && value >> (8 * width) != 0)) continue;
                        Buffer bytes = original;
                        std::memcpy(bytes.data() + at, &value, width);
                        test::repair_checksums(bytes);
                        use(bytes);
                        ++tried;
                    }
        }
        MESSAGE(tried, " hostile fields survived");
        CHECK(tried > 10000);
    }
}
