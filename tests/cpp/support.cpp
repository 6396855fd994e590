#include "support.h"

#include <dirent.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstdio>

namespace qmoe::test {
namespace {

constexpr uint16_t kInt = 1, kTernary = 2;

float sixteenths(Random& random) {
    const float magnitude = static_cast<float>(1 + random.below(127)) / 16.0f;
    return random.below(2) == 0 ? magnitude : -magnitude;
}

}  // namespace

MatrixInput Matrix::input() const {
    MatrixInput in;
    in.format = ternary ? kTernary : kInt;
    in.rows = rows;
    in.cols = cols;
    if (ternary) {
        in.trits = trits;
        in.levels = levels;
    } else {
        in.bits = bits;
        in.group = group;
        in.scale_dtype = static_cast<uint8_t>(scale_type);
        in.codes = codes;
        in.scales = scales;
        in.zeros = zeros;
        in.half_step = half_step;
    }
    return in;
}

std::vector<float> Matrix::values() const {
    std::vector<float> out(rows * cols);
    const uint64_t width = group == 0 ? cols : group, groups = (cols + width - 1) / width;
    for (uint64_t r = 0; r < rows; ++r)
        for (uint64_t k = 0; k < cols; ++k) {
            float& value = out[r * cols + k];
            if (ternary) {
                const int8_t t = trits[r * cols + k];
                const uint64_t per_row = levels.size() / rows;
                const float high = levels[r * per_row + per_row - 1];
                value = t == 0 ? 0.0f : t > 0 ? high : per_row == 1 ? -high : levels[r * 2];
            } else {
                const uint64_t g = r * groups + k / width;
                // In halves of a step, so that all is integers up to the scale.
                const int middle = (1 << bits) - (half_step ? 1 : 0);
                const int zero = zeros.empty() ? middle : 2 * zeros[g] + (half_step ? 1 : 0);
                value = scales[g] * (0.5f * static_cast<float>(2 * codes[r * cols + k] - zero));
            }
        }
    return out;
}

Matrix int_matrix(Random& random, uint64_t rows, uint64_t cols, uint8_t bits, uint32_t group, bool zeros,
                  ScaleType type, bool half_step) {
    Matrix m;
    m.rows = rows;
    m.cols = cols;
    m.bits = bits;
    m.group = group;
    m.scale_type = type;
    m.half_step = half_step;
    const uint64_t width = group == 0 ? cols : group, groups = (cols + width - 1) / width;
    for (uint64_t i = 0; i < rows * cols; ++i) m.codes.push_back(static_cast<uint8_t>(random.below(1u << bits)));
    for (uint64_t i = 0; i < rows * groups; ++i) {
        m.scales.push_back(sixteenths(random));
        if (zeros) m.zeros.push_back(static_cast<uint8_t>(random.below(1u << bits)));
    }
    return m;
}

Matrix ternary_matrix(Random& random, uint64_t rows, uint64_t cols, uint32_t levels, uint32_t zeros_of_1024) {
    Matrix m;
    m.ternary = true;
    m.rows = rows;
    m.cols = cols;
    for (uint64_t i = 0; i < rows * cols; ++i)
        m.trits.push_back(random.below(1024) < zeros_of_1024 ? int8_t{0}
                          : random.below(2) == 0             ? int8_t{1}
                                                             : int8_t{-1});
    for (uint64_t i = 0; i < rows * levels; ++i) m.levels.push_back(sixteenths(random));
    return m;
}

Matrix random_matrix(Random& random, uint64_t rows, uint64_t cols) {
    if (random.below(2) == 0)
        return ternary_matrix(random, rows, cols, static_cast<uint32_t>(1 + random.below(2)),
                              random.pick({0u, 340u, 614u, 819u, 906u, 973u, 1020u, 1024u}));
    const auto bits = random.pick({uint8_t{2}, uint8_t{3}, uint8_t{4}, uint8_t{8}});
    const auto group = random.pick({0u, 16u, 32u, 64u, 128u});
    const auto type = random.pick({ScaleType::kFloat16, ScaleType::kBfloat16, ScaleType::kFloat32});
    const bool zeros = random.below(2) == 0, half_step = random.below(2) == 0;
    return int_matrix(random, rows, cols, bits, group, zeros, type, half_step);
}

Buffer build(const std::vector<Matrix>& matrices) {
    std::vector<MatrixInput> inputs;
    for (const Matrix& m : matrices) inputs.push_back(m.input());
    Buffer out;
    must(build_record(inputs, out).code == Code::kOk);
    return out;
}

Buffer small_int_record() {
    Random random(1);
    std::vector<Matrix> matrices;
    for (int e = 0; e < 2; ++e) matrices.push_back(int_matrix(random, 3, 40, 4, 32, true, ScaleType::kFloat16));
    return build(matrices);
}

Buffer small_ternary_record() {
    Random random(2);
    std::vector<Matrix> matrices;
    for (int e = 0; e < 2; ++e) matrices.push_back(ternary_matrix(random, 40, 70, 2, 800));
    return build(matrices);
}

Status open(const Buffer& bytes) {
    Record record;
    return Record::open(bytes, record);
}

TemporaryDirectory::TemporaryDirectory() {
    const char* const base = getenv("TMPDIR");
    path_ = std::string(base == nullptr ? "/tmp" : base) + "/qmoe-test-XXXXXX";
    must(mkdtemp(path_.data()) != nullptr);
}

TemporaryDirectory::~TemporaryDirectory() {
    if (DIR* const directory = opendir(path_.c_str())) {
        while (const dirent* const entry = readdir(directory)) unlink((path_ + "/" + entry->d_name).c_str());
        closedir(directory);
    }
    rmdir(path_.c_str());
}

std::string TemporaryDirectory::write(const std::string& name, const Buffer& bytes) const {
    const std::string path = path_ + "/" + name;
    FILE* const file = fopen(path.c_str(), "wb");
    must(file != nullptr);
    must((bytes.empty() || fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size()));
    must(fclose(file) == 0);
    return path;
}

Buffer safetensors(const std::string& json, const Buffer& data) {
    Buffer out(8);
    put<uint64_t>(out, 0, json.size());
    out.insert(out.end(), json.begin(), json.end());
    out.insert(out.end(), data.begin(), data.end());
    return out;
}

}  // namespace qmoe::test
