// The inner loops of calibrated rounding against plain loops, bit for bit, on buffers of exactly the right size: for the
// instruction set that this process is pinned to (QMOE_FORCE_ISA).
#include <algorithm>
#include <cmath>
#include <limits>

#include "qmoe/gptq.h"
#include "testing.h"

using namespace qmoe;
using test::Random;

namespace {

using Floats = std::vector<float>;

struct Shape {
    uint32_t experts, rows, columns;  // of the stack
    uint32_t first, width;            // the block
};

constexpr Shape kShapes[] = {{1, 1, 1, 0, 1},      {2, 17, 40, 8, 32},     {1, 16, 128, 0, 128},
                             {3, 5, 200, 128, 72}, {2, 131, 150, 128, 22}, {1, 33, 128, 0, 127}};

Floats uniform(Random& random, size_t count, float low, float high) {
    Floats out(count);
    for (float& x : out) x = low + (high - low) * static_cast<float>(random.below(1 << 20)) / (1 << 20);
    return out;
}

struct Problem {
    Shape shape;
    Floats weight, residual, target, coefficients, precision, scale, zero, low, high, price, bits;
    std::vector<uint8_t> codes;
    uint32_t groups;

    Problem(Random& random, const Shape& s) : shape(s), groups((s.columns + 15) / 16) {
        const size_t all = size_t{s.experts} * s.rows, stack = all * s.columns;
        weight = uniform(random, stack, -1, 1);
        residual = uniform(random, stack, -0.1f, 0.1f);
        target = uniform(random, all * s.width, -1, 1);
        coefficients = uniform(random, size_t{s.experts} * s.width * s.width, -0.3f, 0.3f);
        precision = uniform(random, size_t{s.experts} * s.width, 0.1f, 2);
        scale = uniform(random, all * groups, 0.05f, 0.3f);
        zero = uniform(random, all * groups, 0, 15);
        for (float& z : zero) z = std::floor(z);
        low = uniform(random, all, -1, -0.2f);
        high = uniform(random, all, 0.2f, 1);
        price = uniform(random, all, 0, 0.2f);
        bits = uniform(random, size_t{s.experts} * 3, 0.5f, 3);
        codes.assign(stack, 0xAB);
    }

    RoundBlock block(bool ternary) {
        RoundBlock a{};
        a.experts = shape.experts;
        a.rows = shape.rows;
        a.columns = shape.width;
        a.expert_stride = uint64_t{shape.rows} * shape.columns;
        a.row_stride = shape.columns;
        a.weight = weight.data() + shape.first;
        a.residual = residual.data() + shape.first;
        a.codes = codes.data() + shape.first;
        a.target = target.data();
        a.coefficients = coefficients.data();
        a.coefficient_expert_stride = uint64_t{shape.width} * shape.width;
        a.coefficient_row_stride = shape.width;
        a.coefficient_column_stride = 1;
        a.precision = precision.data();
        a.precision_stride = shape.width;
        a.ternary = ternary;
        a.scale = scale.data();
        a.zero = zero.data();
        a.groups = groups;
        a.width = 16;
        a.top = 15;
        a.first = shape.first;
        a.low = low.data();
        a.high = high.data();
        a.price = price.data();
        a.bits = bits.data();
        return a;
    }
};

// Keeps the compiler from multiplying and adding in one, which would round once less.
float rounded(float x) {
    volatile float kept = x;
    return kept;
}

float error(float precision, float distance, float cost) {
    return rounded(precision * rounded(distance * distance)) + cost;
}

void expect(const RoundBlock& a) {
    for (uint64_t e = 0; e < a.experts; ++e)
        for (uint64_t r = 0; r < a.rows; ++r) {
            const uint64_t row = e * a.rows + r, at = e * a.expert_stride + r * a.row_stride;
            Floats t(a.target + row * a.columns, a.target + (row + 1) * a.columns);
            for (uint32_t j = 0; j < a.columns; ++j) {
                float value = 0;
                if (a.ternary) {
                    const float p = a.precision[e * a.precision_stride + j];
                    const float* const bits = a.bits + 3 * e;
                    const float zero = error(p, t[j], rounded(a.price[row] * bits[1]));
                    const float high = error(p, t[j] - a.high[row], rounded(a.price[row] * bits[2]));
                    const float low = error(p, t[j] - a.low[row], rounded(a.price[row] * bits[0]));
                    const int code = low < std::min(high, zero) ? -1 : high < zero ? 1 : 0;
                    value = code < 0 ? a.low[row] : code > 0 ? a.high[row] : 0;
                    a.codes[at + j] = static_cast<uint8_t>(code);
                } else {
                    const uint64_t group = row * a.groups + (a.first + j) / a.width;
                    const float code = std::clamp(std::nearbyint(rounded(t[j] / a.scale[group]) + a.zero[group]), 0.0f,
                                                  static_cast<float>(a.top));
                    value = a.scale[group] * (code - a.zero[group]);
                    a.codes[at + j] = static_cast<uint8_t>(code);
                }
                const float fresh = a.weight[at + j] - rounded(value), change = fresh - a.residual[at + j];
                a.residual[at + j] = fresh;
                for (uint32_t k = j + 1; k < a.columns; ++k)
                    t[k] += rounded(change *
                                    a.coefficients[e * a.coefficient_expert_stride + j * a.coefficient_row_stride + k]);
            }
        }
}

}  // namespace

TEST_SUITE("gptq") {
    TEST_CASE("rounding a block equals plain loops") {
        Random random(1);
        for (const Shape& shape : kShapes)
            for (const bool ternary : {false, true}) {
                Problem one(random, shape), many = one, plain = one;
                expect(plain.block(ternary));
                REQUIRE(round_block(one.block(ternary), 1).ok());
                REQUIRE(round_block(many.block(ternary), 3).ok());
                CHECK(one.codes == plain.codes);
                CHECK(one.residual == plain.residual);
                CHECK(many.codes == plain.codes);
                CHECK(many.residual == plain.residual);
            }
    }

    TEST_CASE("the chosen grid is at least as good as that of the whole range") {
        Random random(2);
        uint32_t better = 0;
        for (const Shape& shape : kShapes)
            for (const uint32_t type : {1u, 2u, 3u}) {
                Problem p(random, shape);
                ChooseGrid a{};
                a.experts = shape.experts;
                a.rows = shape.rows;
                a.columns = shape.width;
                a.target = p.target.data();
                a.target_row_stride = shape.width;
                a.precision = p.precision.data();
                a.precision_stride = shape.width;
                Floats scale(p.scale.size(), std::numeric_limits<float>::quiet_NaN()), zero = scale;
                a.scale = scale.data();
                a.zero = zero.data();
                a.groups = p.groups;
                a.group = p.groups - 1;
                a.top = 15;
                a.steps = 24;
                a.scale_type = type;
                a.zero_point = true;
                REQUIRE(choose_grid(a, 2).ok());
                for (uint64_t row = 0; row < uint64_t{a.experts} * a.rows; ++row) {
                    const float s = scale[row * a.groups + a.group], z = zero[row * a.groups + a.group];
                    REQUIRE((s > 0 && z >= 0 && z <= 15 && z == std::floor(z)));
                    for (uint32_t g = 0; g + 1 < a.groups; ++g) CHECK(std::isnan(scale[row * a.groups + g]));
                    const auto loss = [&](double at, double with) {
                        double sum = 0;
                        for (uint32_t k = 0; k < a.columns; ++k) {
                            const double t = static_cast<double>(a.target[row * a.target_row_stride + k]);
                            const double code = std::clamp(std::nearbyint(t / at + with), 0.0, 15.0);
                            const double off = at * (code - with) - t;
                            sum += off * off * static_cast<double>(a.precision[row / a.rows * a.precision_stride + k]);
                        }
                        return sum;
                    };
                    const auto* const begin = a.target + row * a.target_row_stride;
                    const double least =
                        std::min(0.0, static_cast<double>(*std::min_element(begin, begin + a.columns)));
                    const double most = std::max(0.0, static_cast<double>(*std::max_element(begin, begin + a.columns)));
                    const double size = (most - least) / 15,
                                 best = loss(static_cast<double>(s), static_cast<double>(z));
                    // The first one that is tried, but for the rounding of its scale.
                    const double whole = loss(size, std::nearbyint(-least / size));
                    CHECK(best <= (type == 3 ? 1.0001 * whole + 1e-9 : 1.1 * whole + 1e-6));
                    better += best < 0.98 * whole;
                }
            }
        CHECK(better > 100);  // of some 1100: narrower ranges are tried, too
    }

    TEST_CASE("ternary sums equal plain loops") {
        Random random(3);
        for (const Shape& shape : kShapes) {
            Problem p(random, shape);
            const size_t all = size_t{shape.experts} * shape.rows;
            const Floats precision = uniform(random, size_t{shape.experts} * shape.columns, 0.1f, 2);
            Floats sums(4 * all, std::numeric_limits<float>::quiet_NaN());
            std::vector<uint32_t> counts(3 * shape.experts, 5);
            TernarySums a{shape.experts, shape.rows,     shape.columns, p.weight.data(), precision.data(), p.low.data(),
                          p.high.data(), p.price.data(), p.bits.data(), sums.data(),     counts.data()};
            REQUIRE(ternary_sums(a, 2).ok());
            std::vector<uint32_t> expected(3 * shape.experts, 5);
            for (size_t row = 0; row < all; ++row) {
                const size_t e = row / shape.rows;
                double sum[4]{};
                for (uint32_t k = 0; k < shape.columns; ++k) {
                    const float w = p.weight[row * shape.columns + k], q = precision[e * shape.columns + k];
                    const float at_zero = error(q, w, rounded(p.price[row] * p.bits[3 * e + 1]));
                    const float at_high = error(q, w - p.high[row], rounded(p.price[row] * p.bits[3 * e + 2]));
                    const float at_low = error(q, w - p.low[row], rounded(p.price[row] * p.bits[3 * e]));
                    const int code = at_low < std::min(at_high, at_zero) ? -1 : at_high < at_zero ? 1 : 0;
                    ++expected[3 * e + static_cast<size_t>(code + 1)];
                    if (code == 0) continue;
                    sum[code < 0 ? 0 : 2] += static_cast<double>(q) * static_cast<double>(w);
                    sum[code < 0 ? 1 : 3] += static_cast<double>(q);
                }
                for (size_t i = 0; i < 4; ++i) CHECK(static_cast<double>(sums[4 * row + i]) == doctest::Approx(sum[i]));
            }
            CHECK(counts == expected);
        }
    }

    TEST_CASE("what cannot be is refused") {
        Random random(4);
        Problem p(random, {1, 4, 64, 0, 32});
        RoundBlock a = p.block(false);
        a.groups = 1;  // the block reaches into a second one
        CHECK(round_block(a, 1).code == Code::kShape);
        a = p.block(false);
        a.columns = kMaxBlockColumns + 1;
        CHECK(round_block(a, 1).code == Code::kShape);
        a = p.block(false);
        a.top = 256;
        CHECK(round_block(a, 1).code == Code::kValue);
        a = p.block(true);
        a.rows = 0;
        CHECK(round_block(a, 1).code == Code::kShape);
        ChooseGrid grid{};
        grid.experts = grid.rows = grid.columns = grid.groups = grid.top = grid.steps = 1;
        CHECK(choose_grid(grid, 1).code == Code::kDtype);
    }
}
