// qmoe_make_golden DIRECTORY: writes the golden records that do not exist yet, and prints the manifest. Never
// overwrites one.
#include <cstdio>

#include "golden.h"
#include "qmoe/crc32c.h"

int main(int argc, char** argv) {
    if (argc != 2) return std::fprintf(stderr, "usage: qmoe_make_golden DIRECTORY\n"), 2;
    for (const auto& golden : qmoe::test::golden_cases()) {
        std::vector<qmoe::MatrixInput> inputs;
        for (const auto& matrix : golden.matrices) inputs.push_back(matrix.input());
        qmoe::test::Buffer bytes;
        if (const auto status = build_record(inputs, bytes); !status.ok())
            return std::fprintf(stderr, "%s\n", status.what), 1;
        uint32_t values = 0;
        for (const auto& matrix : golden.matrices) {
            const auto v = matrix.values();
            values = qmoe::crc32c({reinterpret_cast<const uint8_t*>(v.data()), v.size() * sizeof(float)}, values);
        }
        const std::string path = std::string(argv[1]) + "/" + golden.name + ".qmoe";
        if (FILE* const file = std::fopen(path.c_str(), "wbx")) {
            const bool written = std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
            if (std::fclose(file) != 0 || !written) return std::fprintf(stderr, "cannot write %s\n", path.c_str()), 1;
        }
        std::printf("%s %zu %08x %08x\n", golden.name.c_str(), bytes.size(), qmoe::crc32c(bytes), values);
    }
    return 0;
}
