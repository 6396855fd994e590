// The golden records of version 1: every format and option, made of integers alone. Never change a case: add new ones.
#pragma once

#include <string>
#include <vector>

#include "support.h"

namespace qmoe::test {

struct GoldenCase {
    std::string name;
    std::vector<Matrix> matrices;
};

inline std::vector<GoldenCase> golden_cases() {
    std::vector<GoldenCase> cases;
    const auto add = [&](const std::string& name, auto make) {
        Random random(7000 + cases.size());
        GoldenCase golden{name, {}};
        for (int e = 0; e < 3; ++e) golden.matrices.push_back(make(random, e));
        cases.push_back(std::move(golden));
    };
    struct IntOptions {
        const char* name;
        uint32_t group;
        bool zeros;
        ScaleType type;
    };
    constexpr IntOptions kOptions[] = {{"g32-f16", 32, true, ScaleType::kFloat16},
                                       {"g64-sym-bf16", 64, false, ScaleType::kBfloat16},
                                       {"g128-f32", 128, true, ScaleType::kFloat32},
                                       {"row-sym-f16", 0, false, ScaleType::kFloat16},
                                       {"row-bf16", 0, true, ScaleType::kBfloat16}};
    for (const uint8_t bits : std::initializer_list<uint8_t>{2, 3, 4, 8})
        for (const IntOptions& o : kOptions)
            add("int" + std::to_string(bits) + "-" + o.name,
                [&](Random& random, int) { return int_matrix(random, 5, 150, bits, o.group, o.zeros, o.type); });
    for (const uint32_t levels : {1u, 2u})
        for (const uint32_t zeros : {0u, 341u, 700u, 906u, 1000u, 1024u})
            add(std::string("ternary-") + (levels == 1 ? "sym" : "pair") + "-" + std::to_string(zeros),
                [&](Random& random, int) { return ternary_matrix(random, 70, 150, levels, zeros); });
    add("ternary-long-rows", [](Random& random, int) { return ternary_matrix(random, 5, 5000, 2, 906); });
    add("ternary-unlike-experts",
        [](Random& random, int e) { return ternary_matrix(random, 40, 77, 2, e == 0 ? 1020 : 100); });
    add("mixed", [](Random& random, int e) {
        return e == 0   ? int_matrix(random, 33, 70, 4, 32, true, ScaleType::kFloat16)
               : e == 1 ? ternary_matrix(random, 33, 70, 2, 800)
                        : int_matrix(random, 33, 70, 2, 0, false, ScaleType::kFloat32);
    });
    constexpr IntOptions kLater[] = {{"g16-f16", 16, true, ScaleType::kFloat16},
                                     {"g16-sym-bf16", 16, false, ScaleType::kBfloat16}};
    constexpr IntOptions kHalfSteps[] = {{"g16-half-f16", 16, true, ScaleType::kFloat16},
                                         {"g64-sym-half-bf16", 64, false, ScaleType::kBfloat16},
                                         {"g128-half-f32", 128, true, ScaleType::kFloat32},
                                         {"row-sym-half-f16", 0, false, ScaleType::kFloat16}};
    for (const uint8_t bits : std::initializer_list<uint8_t>{2, 3, 4, 8}) {
        for (const IntOptions& o : kLater)
            add("int" + std::to_string(bits) + "-" + o.name,
                [&](Random& random, int) { return int_matrix(random, 5, 150, bits, o.group, o.zeros, o.type); });
        for (const IntOptions& o : kHalfSteps)
            add("int" + std::to_string(bits) + "-" + o.name,
                [&](Random& random, int) { return int_matrix(random, 5, 150, bits, o.group, o.zeros, o.type, true); });
    }
    add("int-whole-and-half-steps",
        [](Random& random, int e) { return int_matrix(random, 4, 50, 2, 16, true, ScaleType::kFloat16, e == 1); });
    return cases;
}

}  // namespace qmoe::test
