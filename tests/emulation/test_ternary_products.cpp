// Products of ternary matrices against float64, by the kernels for GPUs, whose threads are emulated.
#include <cmath>

#include "common.cuh"
#include "formats/ternary_streams.h"
#include "testing.h"

using namespace qmoe;
using test::Matrix, test::Random;

namespace {

constexpr size_t kGuard = 8;
constexpr float kPoison = 777.0f;  // rounded to bfloat16, 776

float rounded(float value) {
    return __bfloat162float(__float2bfloat16_rn(value));
}

// Numbers of 16 bits, with poison behind them.
struct Numbers {
    std::vector<__nv_bfloat16> values;

    explicit Numbers(size_t count) : values(count + kGuard, __float2bfloat16_rn(kPoison)) {}
    static Numbers random(Random& random, size_t count) {
        Numbers made(count);
        for (size_t i = 0; i < count; ++i)
            made.values[i] = __float2bfloat16_rn((static_cast<float>(random.below(4001)) - 2000.0f) / 1000.0f);
        return made;
    }
    double operator[](size_t i) const { return __bfloat162float(values[i]); }
    bool guarded() const {
        for (size_t i = values.size() - kGuard; i < values.size(); ++i)
            if (__bfloat162float(values[i]) != rounded(kPoison)) return false;
        return true;
    }
};

// A stack as a kernel sees it, and its values.
struct Stack {
    cuda::TernaryStack view{};
    std::vector<std::vector<float>> values;

    Stack(const std::vector<Matrix>& matrices, RowOrder order) {
        const test::Buffer bytes = test::build(matrices);
        Record record;
        REQUIRE(Record::open(bytes, record).ok());
        std::vector<uint8_t> streams;
        REQUIRE(cuda::ternary_streams_shape(record, view.shape).ok());
        REQUIRE(cuda::ternary_streams(record, view.shape, streams).ok());
        room_.resize(streams.size() / sizeof(uint4) + 1);
        std::memcpy(room_.data(), streams.data(), streams.size());
        view.streams = room_.data();
        view.experts = matrices.size();
        view.order = order;
        for (const Matrix& matrix : matrices) values.push_back(matrix.values());
    }

  private:
    struct alignas(16) Quad {
        uint32_t words[4];
    };
    std::vector<Quad> room_;
};

Matrix matrix(Random& random, uint64_t rows, uint64_t cols, uint32_t zeros) {
    Matrix made = test::ternary_matrix(random, rows, cols, 2, zeros);
    for (float& level : made.levels) level /= 32;
    return made;
}

void check_linear(uint64_t rows, uint64_t cols, uint32_t zeros, uint64_t tokens, bool biased) {
    Random random(rows * cols + zeros);
    Stack stack({matrix(random, rows, cols, zeros)}, RowOrder::kPlain);
    const Numbers x = Numbers::random(random, tokens * cols), bias = Numbers::random(random, rows);
    Numbers y(tokens * rows), again(tokens * rows);
    cuda::TernaryLinear call{};
    call.weight = stack.view;
    call.x = x.values.data();
    call.bias = biased ? bias.values.data() : nullptr;
    call.y = y.values.data();
    call.tokens = tokens;
    call.type = cuda::OutputType::kBfloat16;
    REQUIRE(cuda::linear_ternary(call, nullptr).ok());
    call.y = again.values.data();
    REQUIRE(cuda::linear_ternary(call, nullptr).ok());
    REQUIRE(y.guarded());
    bool close = true;
    for (uint64_t t = 0; t < tokens; ++t)
        for (uint64_t r = 0; r < rows; ++r) {
            double expected = biased ? bias[r] : 0.0, magnitude = 1e-3;
            for (uint64_t k = 0; k < cols; ++k) {
                const double product = double{stack.values[0][r * cols + k]} * x[t * cols + k];
                expected += product, magnitude += std::abs(product);
            }
            const double found = y[t * rows + r];
            close &= std::abs(found - expected) <= 4e-3 * std::abs(expected) + 1e-5 * magnitude;
            close &= found == again[t * rows + r];
        }
    CHECK(close);
}

struct Layer {
    uint64_t experts, hidden, width, tokens, top_k;
    RowOrder order = RowOrder::kHalves;
    uint32_t first_zeros = 906, second_zeros = 906;
    bool biased = false;

    void check(uint64_t seed) const {
        Random random(seed);
        const uint64_t rows = order == RowOrder::kPlain ? width : 2 * width;
        std::vector<Matrix> firsts, seconds;
        for (uint64_t e = 0; e < experts; ++e) {
            firsts.push_back(matrix(random, rows, hidden, first_zeros));
            seconds.push_back(matrix(random, hidden, width, second_zeros));
        }
        const Stack first(firsts, order), second(seconds, RowOrder::kPlain);
        const Numbers x = Numbers::random(random, tokens * hidden), b1 = Numbers::random(random, experts * rows),
                      b2 = Numbers::random(random, experts * hidden);
        Numbers y(tokens * hidden);
        std::vector<int64_t> ids(tokens * top_k);
        std::vector<float> weights(tokens * top_k);
        for (int64_t& id : ids) id = static_cast<int64_t>(random.below(experts + 2)) - 1;  // other ranks' as well
        for (float& weight : weights) weight = static_cast<float>(random.below(1000)) / 1000.0f;
        cuda::TernaryExperts call{};
        call.first = first.view, call.second = second.view;
        call.x = x.values.data(), call.y = y.values.data();
        call.ids = ids.data(), call.weights = weights.data(), call.weights_type = cuda::OutputType::kFloat32;
        if (biased) call.first_bias = b1.values.data(), call.second_bias = b2.values.data();
        call.tokens = tokens, call.top_k = top_k;
        call.type = cuda::OutputType::kBfloat16;
        call.gate = {Activation::kSilu, false, 0.0f, 0.0f};
        REQUIRE(cuda::workspace_ternary(call, &call.workspace_bytes).ok());
        std::vector<float> workspace(call.workspace_bytes / 4 + 8, NAN);
        const auto address = reinterpret_cast<uintptr_t>(workspace.data());
        call.workspace = reinterpret_cast<void*>((address + 15) / 16 * 16);
        REQUIRE(cuda::experts_ternary(call, nullptr).ok());
        REQUIRE(y.guarded());

        std::vector<double> expected(tokens * hidden);
        for (uint64_t choice = 0; choice < ids.size(); ++choice) {
            if (ids[choice] < 0 || ids[choice] >= static_cast<int64_t>(experts)) continue;
            const auto e = static_cast<uint64_t>(ids[choice]), token = choice / top_k;
            std::vector<double> raw(rows), inner(width);
            for (uint64_t r = 0; r < rows; ++r) {
                raw[r] = biased ? b1[e * rows + r] : 0.0;
                for (uint64_t k = 0; k < hidden; ++k)
                    raw[r] += double{first.values[e][r * hidden + k]} * x[token * hidden + k];
            }
            const auto silu = [](double v) { return v / (1.0 + std::exp(-v)); };
            for (uint64_t i = 0; i < width; ++i)
                inner[i] =
                    rounded(static_cast<float>(order == RowOrder::kPlain    ? silu(raw[i])
                                               : order == RowOrder::kHalves ? silu(raw[i]) * raw[width + i]
                                                                            : silu(raw[2 * i]) * raw[2 * i + 1]));
            for (uint64_t r = 0; r < hidden; ++r) {
                double sum = biased ? b2[e * hidden + r] : 0.0;
                for (uint64_t i = 0; i < width; ++i) sum += double{second.values[e][r * width + i]} * inner[i];
                expected[token * hidden + r] += double{weights[choice]} * sum;
            }
        }
        double size = 0.0;
        for (const double value : expected) size += value * value;
        size = std::sqrt(size / static_cast<double>(expected.size())) + 1e-9;
        bool close = true;
        for (size_t i = 0; i < expected.size(); ++i)
            close &= std::abs(y[i] - expected[i]) <= 8e-3 * (std::abs(expected[i]) + size);
        CHECK(close);
    }
};

}  // namespace

TEST_SUITE("emulated ternary products") {
    TEST_CASE("linear layers: densities, ragged shapes, numbers of tokens") {
        for (const uint64_t tokens : {1, 2, 4, 7, 8, 11}) {
            check_linear(33, 129, 906, tokens, true);
            check_linear(5, 7, 500, tokens, false);
        }
        check_linear(1, 1, 1024, 5, true);
        check_linear(64, 300, 0, 3, true);
        check_linear(300, 520, 700, 4, false);
        check_linear(100, 1000, 980, 8, true);
        check_linear(20, 3000, 906, 2, false);
        check_linear(9, 15000, 906, 8, false);  // no room for activations of eight tokens
        check_linear(3, 40000, 906, 2, true);   // nor of two
    }

    TEST_CASE("layers of experts: gates, biases, few tokens and many") {
        for (const RowOrder order : {RowOrder::kHalves, RowOrder::kInterleaved, RowOrder::kPlain})
            for (const uint64_t tokens : {1, 3, 9})
                Layer{.experts = 5,
                      .hidden = 70,
                      .width = 36,
                      .tokens = tokens,
                      .top_k = 2,
                      .order = order,
                      .biased = tokens != 3}
                    .check(tokens);
        Layer{.experts = 3, .hidden = 64, .width = 32, .tokens = 20, .top_k = 3}.check(20);
        Layer{.experts = 40, .hidden = 64, .width = 32, .tokens = 6, .top_k = 8, .first_zeros = 1024, .biased = true}
            .check(21);
    }

    TEST_CASE("projections that differ in bits are launches of their own") {
        Layer{.experts = 5,
              .hidden = 129,
              .width = 77,
              .tokens = 13,
              .top_k = 2,
              .first_zeros = 980,
              .second_zeros = 300,
              .biased = true}
            .check(30);
    }

    TEST_CASE("unpacking") {
        Random random(40);
        for (const uint32_t zeros : {0u, 500u, 906u, 1020u}) {
            const Stack stack({matrix(random, 37, 611, zeros), matrix(random, 37, 611, zeros)}, RowOrder::kPlain);
            for (uint64_t expert = 0; expert < 2; ++expert) {
                std::vector<float> out(37 * 611 + kGuard, kPoison);
                REQUIRE(cuda::unpack_ternary(stack.view, expert, out.data(), cuda::OutputType::kFloat32, nullptr).ok());
                for (size_t i = out.size() - kGuard; i < out.size(); ++i) REQUIRE(out[i] == kPoison);
                out.resize(37 * 611);
                CHECK(out == stack.values[expert]);
            }
        }
    }

    TEST_CASE("refusals") {
        Random random(50);
        const Stack stack({matrix(random, 1, 62000, 906)}, RowOrder::kPlain);
        const Numbers x = Numbers::random(random, 62000);
        Numbers y(1);
        cuda::TernaryLinear call{};
        call.weight = stack.view, call.x = x.values.data(), call.y = y.values.data(), call.tokens = 1;
        call.type = cuda::OutputType::kBfloat16;
        CHECK(cuda::linear_ternary(call, nullptr).code == Code::kNoKernel);
        call.type = cuda::OutputType::kFloat32;
        CHECK(cuda::linear_ternary(call, nullptr).code == Code::kDtype);
        call.weight.experts = 2;
        CHECK(cuda::linear_ternary(call, nullptr).code == Code::kValue);
        float out = 0.0f;
        CHECK(cuda::unpack_ternary(stack.view, 1, &out, cuda::OutputType::kFloat32, nullptr).code == Code::kValue);
    }
}
