// The arguments of the inner loops of calibrated quantization, as Python gives them: numbers and raw pointers by name. The
// loops on the CPU (qmoe/gptq.h) and those on a GPU (qmoe/cuda.h) take the same ones.
#pragma once

#include <cstdint>

#include "bind.h"
#include "qmoe/gptq.h"

namespace qmoe::bind {

template <class T>
T* pointer(const pybind11::dict& fields, const char* name) {
    return reinterpret_cast<T*>(fields[name].cast<uintptr_t>());
}

template <class T>
T number(const pybind11::dict& fields, const char* name) {
    return fields[name].cast<T>();
}

inline RoundBlock round_block_of(const pybind11::dict& block, const pybind11::dict& grid) {
    RoundBlock a{};
    a.experts = number<uint32_t>(block, "experts");
    a.rows = number<uint32_t>(block, "rows");
    a.columns = number<uint32_t>(block, "columns");
    a.expert_stride = number<uint64_t>(block, "expert_stride");
    a.row_stride = number<uint64_t>(block, "row_stride");
    a.weight = pointer<float>(block, "weight");
    a.residual = pointer<float>(block, "residual");
    a.codes = pointer<uint8_t>(block, "codes");
    a.target = pointer<float>(block, "target");
    a.coefficients = pointer<float>(block, "coefficients");
    a.coefficient_expert_stride = number<uint64_t>(block, "coefficient_expert_stride");
    a.coefficient_row_stride = number<uint64_t>(block, "coefficient_row_stride");
    a.coefficient_column_stride = number<uint64_t>(block, "coefficient_column_stride");
    a.precision = pointer<float>(block, "precision");
    a.precision_stride = number<uint64_t>(block, "precision_stride");
    a.ternary = grid.contains("price");
    if (a.ternary) {
        a.low = pointer<float>(grid, "low");
        a.high = pointer<float>(grid, "high");
        a.price = pointer<float>(grid, "price");
        a.bits = pointer<float>(grid, "bits");
    } else {
        a.scale = pointer<float>(grid, "scale");
        a.zero = pointer<float>(grid, "zero");
        a.groups = number<uint32_t>(grid, "groups");
        a.width = number<uint32_t>(grid, "width");
        a.top = number<uint32_t>(grid, "top");
        a.first = number<uint32_t>(grid, "first");
    }
    return a;
}

inline ChooseGrid choose_grid_of(const pybind11::dict& target, const pybind11::dict& grid) {
    ChooseGrid a{};
    a.experts = number<uint32_t>(target, "experts");
    a.rows = number<uint32_t>(target, "rows");
    a.columns = number<uint32_t>(target, "columns");
    a.target = pointer<float>(target, "target");
    a.target_row_stride = number<uint64_t>(target, "target_row_stride");
    a.precision = pointer<float>(target, "precision");
    a.precision_stride = number<uint64_t>(target, "precision_stride");
    a.scale = pointer<float>(grid, "scale");
    a.zero = pointer<float>(grid, "zero");
    a.groups = number<uint32_t>(grid, "groups");
    a.group = number<uint32_t>(grid, "group");
    a.top = number<uint32_t>(grid, "top");
    a.steps = number<uint32_t>(grid, "steps");
    a.scale_type = number<uint32_t>(grid, "scale_type");
    a.zero_point = number<bool>(grid, "zero_point");
    a.half_step = number<bool>(grid, "half_step");
    return a;
}

inline TernarySums ternary_sums_of(const pybind11::dict& fields) {
    TernarySums a{};
    a.experts = number<uint32_t>(fields, "experts");
    a.rows = number<uint32_t>(fields, "rows");
    a.columns = number<uint32_t>(fields, "columns");
    a.weight = pointer<float>(fields, "weight");
    a.precision = pointer<float>(fields, "precision");
    a.low = pointer<float>(fields, "low");
    a.high = pointer<float>(fields, "high");
    a.price = pointer<float>(fields, "price");
    a.bits = pointer<float>(fields, "bits");
    a.sums = pointer<float>(fields, "sums");
    a.counts = pointer<uint32_t>(fields, "counts");
    return a;
}

}  // namespace qmoe::bind
