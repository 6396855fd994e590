// Records written by version 1 stay readable for ever, and encoders keep writing the same bytes.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>

#include "golden.h"
#include "qmoe/crc32c.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer;

namespace {

struct Line {
    size_t bytes = 0;
    uint32_t record = 0, values = 0;
};

std::map<std::string, Line> manifest() {
    std::ifstream file(QMOE_GOLDEN "/manifest.txt");
    std::map<std::string, Line> out;
    std::string name;
    Line line;
    while (file >> name >> std::dec >> line.bytes >> std::hex >> line.record >> line.values) out[name] = line;
    return out;
}

Buffer contents(const std::string& name) {
    std::ifstream file(QMOE_GOLDEN "/" + name + ".qmoe", std::ios::binary);
    return Buffer(std::istreambuf_iterator<char>(file), {});
}

}  // namespace

TEST_SUITE("golden") {
    TEST_CASE("every stored record has the bytes of the manifest and decodes to the values of the manifest") {
        const auto lines = manifest();
        REQUIRE(lines.size() >= 35);
        for (const auto& [name, line] : lines) {
            CAPTURE(name);
            const Buffer bytes = contents(name);
            REQUIRE(bytes.size() == line.bytes);
            REQUIRE(crc32c(bytes) == line.record);
            Record record;
            REQUIRE(Record::open(bytes, record).code == Code::kOk);
            REQUIRE(record.verify().code == Code::kOk);
            uint32_t crc = 0;
            std::vector<float> values(record.rows() * record.cols());
            for (uint64_t e = 0; e < record.experts(); ++e) {
                REQUIRE(record.decode_rows(e, 0, record.rows(), values.data()).code == Code::kOk);
                crc = crc32c({reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(float)}, crc);
            }
            REQUIRE(crc == line.values);
        }
    }

    TEST_CASE("encoding the same integers gives the same bytes") {
        const auto lines = manifest();
        const auto cases = test::golden_cases();
        CHECK(cases.size() == lines.size());
        for (const auto& golden : cases) {
            CAPTURE(golden.name);
            REQUIRE(lines.count(golden.name) == 1);
            REQUIRE(test::build(golden.matrices) == contents(golden.name));
        }
    }
}
