// What the binding files share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "qmoe/prepacked.h"
#include "qmoe/record.h"
#include "qmoe/status.h"

namespace qmoe::bind {

using Bytes = pybind11::array_t<uint8_t, pybind11::array::c_style>;

// Raises qmoe_core.errors.QmoeError. `where` may hold file, tensor, offset, expected and actual.
[[noreturn]] void raise(Code code, const std::string& what, pybind11::dict where = {});
void check(const Status& status, pybind11::dict where = {});

std::span<const uint8_t> bytes_of(const Bytes& array);
Bytes to_array(std::vector<uint8_t>&& bytes);

// The record in `bytes`, which must outlive it; raises what Record::open refuses. Releases the GIL while it reads.
Record open_record(const Bytes& bytes, bool check_crc);
// The same, and raises unless the record has this expert.
Record open_record_with(const Bytes& bytes, bool check_crc, uint64_t expert);

// Of an argument: 0 and less are as many as the machine has.
int threads_of(int threads);

// From Python's names; E_VALUE for others.
RowOrder row_order_of(const std::string& name);
Activation activation_of(const std::string& name);

void bind_cuda(pybind11::module_& m);
void bind_gptq(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);
void bind_safetensors(pybind11::module_& m);

}  // namespace qmoe::bind
