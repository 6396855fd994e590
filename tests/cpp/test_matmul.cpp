// grouped_linear against a float64 reference, for the instruction set that this process is pinned to (QMOE_FORCE_ISA).
#include <cmath>
#include <cstdlib>
#include <string>

#include "half.h"
#include "qmoe/matmul.h"
#include "testing.h"

using namespace qmoe;
using test::Buffer, test::Matrix, test::Random;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kConfigs = 300;
#else
constexpr uint64_t kConfigs = 2000;
#endif
constexpr size_t kGuard = 64;

size_t width(ActivationType type) {
    return type == ActivationType::kFloat32 ? 4 : 2;
}

void put_value(Buffer& bytes, ActivationType type, size_t i, float value) {
    switch (type) {
        case ActivationType::kFloat32: std::memcpy(bytes.data() + 4 * i, &value, 4); return;
        case ActivationType::kFloat16: {
            const uint16_t h = float_to_half(value);
            std::memcpy(bytes.data() + 2 * i, &h, 2);
            return;
        }
        case ActivationType::kBfloat16: {
            const uint16_t b = float_to_bfloat(value);
            std::memcpy(bytes.data() + 2 * i, &b, 2);
            return;
        }
    }
}
double get_value(const uint8_t* bytes, ActivationType type, size_t i) {
    float f = 0;
    uint16_t h = 0;
    if (type == ActivationType::kFloat32) {
        std::memcpy(&f, bytes + 4 * i, 4);
        return static_cast<double>(f);
    }
    std::memcpy(&h, bytes + 2 * i, 2);
    return static_cast<double>(type == ActivationType::kFloat16 ? half_to_float(h) : bfloat_to_float(h));
}

struct Problem {
    std::vector<Matrix> matrices;
    Buffer bytes, x;
    Record record;
    ActivationType type = ActivationType::kFloat32;
    uint64_t rows = 0, cols = 0, tokens = 0;
    std::vector<int64_t> offsets;
};

// Every bit of the output, guards included, begins as 0xFF: a NaN in all three types.
Buffer run(const Problem& p, int threads) {
    const size_t bytes = p.tokens * p.rows * width(p.type);
    Buffer y(bytes + 2 * kGuard, 0xFF);
    const Status status = grouped_linear(p.record, p.x.data(), p.type, p.tokens, p.offsets, y.data() + kGuard, threads);
    REQUIRE(status.code == Code::kOk);
    for (size_t i = 0; i < kGuard; ++i) REQUIRE((y[i] == 0xFF && y[y.size() - 1 - i] == 0xFF));
    return Buffer(y.begin() + kGuard, y.end() - kGuard);
}

void check(const Problem& p, const Buffer& y) {
    // float32 sums of K products, then one rounding to the output's type.
    const double sum_error = 4e-7 * std::sqrt(static_cast<double>(p.cols)) + 4e-6;
    const double round_error = p.type == ActivationType::kFloat32   ? 1e-7
                               : p.type == ActivationType::kFloat16 ? 4.9e-4
                                                                    : 4e-3;
    for (uint64_t t = 0; t < p.tokens; ++t) {
        size_t expert = p.matrices.size();
        for (size_t e = 0; e < p.matrices.size(); ++e)
            if (static_cast<int64_t>(t) >= p.offsets[e] && static_cast<int64_t>(t) < p.offsets[e + 1]) expert = e;
        const auto w =
            expert < p.matrices.size() ? p.matrices[expert].values() : std::vector<float>(p.rows * p.cols, 0.0f);
        for (uint64_t n = 0; n < p.rows; ++n) {
            double sum = 0, magnitude = 0;
            for (uint64_t k = 0; k < p.cols; ++k) {
                const double product =
                    static_cast<double>(w[n * p.cols + k]) * get_value(p.x.data(), p.type, t * p.cols + k);
                sum += product;
                magnitude += std::abs(product);
            }
            const double got = get_value(y.data(), p.type, t * p.rows + n);
            if (expert == p.matrices.size()) {
                REQUIRE(got == 0.0);
            } else {
                // int4 and its kin compute scale * (sum of code * x - zero * sum of x): up to 2^bits times the
                // magnitude cancels.
                const double slack = p.matrices[expert].ternary ? 2.0 : p.matrices[expert].bits == 8 ? 300.0 : 20.0;
                INFO("token ", t, " row ", n, " got ", got, " wants ", sum);
                REQUIRE(std::abs(got - sum) <=
                        sum_error * slack * (magnitude + 1) + round_error * (std::abs(sum) + 1e-4));
            }
        }
    }
}

Problem random_problem(uint64_t seed) {
    Random random(seed);
    Problem p;
    p.rows = random.pick({1 + random.below(8), 1 + random.below(70), uint64_t{32}});
    p.cols = random.pick({1 + random.below(8), 1 + random.below(300), uint64_t{64}, uint64_t{128}});
    p.type = random.pick({ActivationType::kFloat32, ActivationType::kFloat16, ActivationType::kBfloat16});
    const uint64_t experts = 1 + random.below(4);
    p.offsets.push_back(static_cast<int64_t>(random.below(3)));  // rows in front that belong to nobody
    for (uint64_t e = 0; e < experts; ++e) {
        p.matrices.push_back(e > 0 && random.below(2) == 0 ? p.matrices[0]
                                                           : test::random_matrix(random, p.rows, p.cols));
        p.offsets.push_back(p.offsets.back() + static_cast<int64_t>(random.pick({0u, 0u, 1u, 1u, 2u, 5u, 33u})));
    }
    p.tokens = static_cast<uint64_t>(p.offsets.back()) + random.below(3);  // and behind
    p.bytes = test::build(p.matrices);
    REQUIRE(Record::open(p.bytes, p.record).ok());
    p.x.resize(p.tokens * p.cols * width(p.type));
    for (size_t i = 0; i < p.tokens * p.cols; ++i)
        put_value(p.x, p.type, i, (static_cast<float>(random.below(257)) - 128.0f) / 64.0f);
    return p;
}

}  // namespace

TEST_SUITE("matmul") {
    TEST_CASE("the instruction set is the one asked for") {
        REQUIRE(active_isa() != nullptr);
        if (const char* const forced = std::getenv("QMOE_FORCE_ISA")) CHECK(std::string(active_isa()) == forced);
        MESSAGE("kernels: ", std::string(active_isa()));
    }

    TEST_CASE(
        "seeded configurations: all formats, ragged shapes, empty experts, poisoned outputs, any number of threads") {
        for (uint64_t seed = 0; seed < kConfigs; ++seed) {
            CAPTURE(seed);
            const Problem p = random_problem(seed);
            const Buffer y = run(p, 1);
            check(p, y);
            REQUIRE(run(p, 1) == y);
            REQUIRE(run(p, 2) == y);
            REQUIRE(run(p, 3) == y);
        }
    }

    TEST_CASE("every int format over columns around the halves of blocks, one token and many") {
        Random random(60);
        for (const uint8_t bits : std::initializer_list<uint8_t>{2, 3, 4, 8})
            for (const uint32_t group : {0u, 16u, 32u, 64u})
                for (const bool zeros : {false, true})
                    for (const bool half_step : {false, true})
                        for (const uint64_t cols : {1u, 15u, 16u, 17u, 31u, 32u, 33u, 48u, 49u, 65u, 96u, 111u})
                            for (const uint64_t tokens : {1u, 3u}) {
                                CAPTURE(bits);
                                CAPTURE(group);
                                CAPTURE(zeros);
                                CAPTURE(half_step);
                                CAPTURE(cols);
                                Problem p;
                                p.rows = 5;
                                p.cols = cols;
                                p.tokens = tokens;
                                p.matrices.push_back(test::int_matrix(random, p.rows, cols, bits, group, zeros,
                                                                      ScaleType::kFloat32, half_step));
                                p.offsets = {0, static_cast<int64_t>(tokens)};
                                p.bytes = test::build(p.matrices);
                                REQUIRE(Record::open(p.bytes, p.record).ok());
                                p.x.resize(tokens * cols * 4);
                                for (size_t i = 0; i < tokens * cols; ++i)
                                    put_value(p.x, p.type, i, (static_cast<float>(random.below(257)) - 128.0f) / 64.0f);
                                check(p, run(p, 1));
                            }
    }

    TEST_CASE("no tokens at all") {
        Problem p = random_problem(5);
        p.tokens = 0;
        p.offsets.assign(p.matrices.size() + 1, 0);
        CHECK(grouped_linear(p.record, nullptr, p.type, 0, p.offsets, nullptr, 2).code == Code::kOk);
    }

    TEST_CASE("matrices of several chunks and blocks, one token and many, alike on 1 and 2 threads") {
        for (uint64_t seed = 0; seed < 6; ++seed) {
            CAPTURE(seed);
            Random random(900 + seed);
            Problem p;
            p.rows = 150;
            p.cols = 1000 + random.below(40);
            p.tokens = seed % 2 == 0 ? 1 : 5;
            p.matrices.push_back(seed < 3 ? test::ternary_matrix(random, p.rows, p.cols, 2, 900)
                                          : test::int_matrix(random, p.rows, p.cols, static_cast<uint8_t>(seed - 1),
                                                             128, true, ScaleType::kFloat16));
            p.offsets = {0, static_cast<int64_t>(p.tokens)};
            p.bytes = test::build(p.matrices);
            REQUIRE(Record::open(p.bytes, p.record).ok());
            p.x.resize(p.tokens * p.cols * 4);
            for (size_t i = 0; i < p.tokens * p.cols; ++i)
                put_value(p.x, p.type, i, (static_cast<float>(random.below(257)) - 128.0f) / 64.0f);
            const Buffer y = run(p, 1);
            check(p, y);
            REQUIRE(run(p, 2) == y);
        }
    }

    TEST_CASE("E_SHAPE and E_VALUE: offsets of the wrong number, descending, negative or beyond the tokens") {
        const Problem p = random_problem(7);
        Buffer y(p.tokens * p.rows * width(p.type));
        const auto code = [&](const std::vector<int64_t>& offsets) {
            return grouped_linear(p.record, p.x.data(), p.type, p.tokens, offsets, y.data(), 1).code;
        };
        const size_t n = p.matrices.size() + 1;
        const auto tokens = static_cast<int64_t>(p.tokens);
        CHECK(code(std::vector<int64_t>(n - 1, 0)) == Code::kShape);
        CHECK(code(std::vector<int64_t>(n + 1, 0)) == Code::kShape);
        CHECK(code({}) == Code::kShape);
        std::vector<int64_t> bad(n, 0);
        bad.back() = tokens + 1;
        CHECK(code(bad) == Code::kValue);
        bad.assign(n, 0);
        bad.front() = -1;
        CHECK(code(bad) == Code::kValue);
        bad.assign(n, 0);
        bad.front() = 1;
        CHECK(code(bad) == Code::kValue);
    }
}

TEST_SUITE("no-kernel") {
    TEST_CASE("E_NO_KERNEL: an instruction set that does not exist is refused, not replaced") {
        REQUIRE(std::string(std::getenv("QMOE_FORCE_ISA")) == "none");
        CHECK(active_isa() == nullptr);
        const Problem p = random_problem(8);
        Buffer y(p.tokens * p.rows * width(p.type));
        CHECK(grouped_linear(p.record, p.x.data(), p.type, p.tokens, p.offsets, y.data(), 1).code == Code::kNoKernel);
    }
}
