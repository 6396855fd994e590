// The inner loops of calibrated quantization on the CPU as Python sees them.
#include "qmoe/gptq.h"

#include "gptq_fields.h"

namespace py = pybind11;

namespace qmoe::bind {
namespace {

// Pointers are those of tensors that the caller keeps alive.
template <class Arguments>
void run(Status (*loop)(const Arguments&, int) noexcept, const Arguments& arguments, int threads) {
    Status status;
    {
        const py::gil_scoped_release release;
        status = loop(arguments, threads);
    }
    check(status);
}

}  // namespace

void bind_gptq(py::module_& m) {
    m.def(
        "round_block",
        [](const py::dict& block, const py::dict& grid, int threads) {
            run(&round_block, round_block_of(block, grid), threads);
        },
        py::arg("block"), py::arg("grid"), py::arg("threads"),
        "Round one block of columns with feedback; fields and raw pointers as in qmoe/gptq.h.");
    m.def(
        "choose_grid",
        [](const py::dict& target, const py::dict& grid, int threads) {
            run(&choose_grid, choose_grid_of(target, grid), threads);
        },
        py::arg("target"), py::arg("grid"), py::arg("threads"),
        "Choose the int grid of one group of columns; fields and raw pointers as in qmoe/gptq.h.");
    m.def(
        "ternary_sums",
        [](const py::dict& fields, int threads) { run(&ternary_sums, ternary_sums_of(fields), threads); },
        py::arg("fields"), py::arg("threads"),
        "Sums per row and counts per matrix of ternary codes; fields as in qmoe/gptq.h.");
}

}  // namespace qmoe::bind
