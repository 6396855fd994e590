// What the C++ tests and the fuzzers share: a seeded generator, matrices whose stored values are known exactly, and
// byte surgery.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "qmoe/record.h"
#include "qmoe/status.h"

namespace qmoe::test {

using Buffer = std::vector<uint8_t>;

// For helpers that the fuzzers use too, which have no doctest to report to.
inline void must(bool condition) {
    if (!condition) throw std::logic_error("a test's own preparation failed");
}

// SplitMix64: the same numbers on every machine.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    uint64_t below(uint64_t n) { return next() % n; }
    template <class T>
    T pick(std::initializer_list<T> values) {
        return *(values.begin() + below(values.size()));
    }

  private:
    uint64_t state_;
};

// One matrix with the arrays that its MatrixInput points to.
struct Matrix {
    uint64_t rows = 0, cols = 0;
    bool ternary = false;
    uint8_t bits = 4;
    uint32_t group = 32;
    ScaleType scale_type = ScaleType::kFloat16;
    bool half_step = false;
    Buffer codes, zeros;
    std::vector<float> scales, levels;
    std::vector<int8_t> trits;

    MatrixInput input() const;
    std::vector<float> values() const;  // (rows, cols): what every decoder must give
};

// Scales and levels are multiples of 1/16 below 8 that every scale type represents exactly.
Matrix int_matrix(Random& random, uint64_t rows, uint64_t cols, uint8_t bits, uint32_t group, bool zeros,
                  ScaleType type, bool half_step = false);
// Trits are zero `zeros_of_1024` times in 1024.
Matrix ternary_matrix(Random& random, uint64_t rows, uint64_t cols, uint32_t levels, uint32_t zeros_of_1024);
// Any format and any parameters.
Matrix random_matrix(Random& random, uint64_t rows, uint64_t cols);

Buffer build(const std::vector<Matrix>& matrices);
Buffer small_int_record();      // 2 experts, 3 x 40, 4 bits, groups of 32, zero points
Buffer small_ternary_record();  // 2 experts, 40 x 70, pairs of levels

template <class T>
void put(Buffer& bytes, size_t at, T value) {
    must(at + sizeof value <= bytes.size());
    std::memcpy(bytes.data() + at, &value, sizeof value);
}
template <class T>
T get(const Buffer& bytes, size_t at) {
    T value;
    must(at + sizeof value <= bytes.size());
    std::memcpy(&value, bytes.data() + at, sizeof value);
    return value;
}

Status open(const Buffer& bytes);  // Record::open with checksums

// A directory that disappears with the object.
class TemporaryDirectory {
  public:
    TemporaryDirectory();
    ~TemporaryDirectory();
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
    const std::string& path() const { return path_; }
    std::string write(const std::string& name, const Buffer& bytes) const;

  private:
    std::string path_;
};

// A safetensors file: length, header, data.
Buffer safetensors(const std::string& json, const Buffer& data);

}  // namespace qmoe::test
