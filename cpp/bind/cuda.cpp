// The CUDA library as Python sees it. Device pointers come from torch; nothing here needs a GPU to be present.
#include "qmoe/cuda.h"

#include "bind.h"
#include "gptq_fields.h"
#include "qmoe/cuda_library.h"
#include "qmoe/record.h"

namespace py = pybind11;

namespace qmoe::bind {
namespace {

const cuda::Api& required_library() {
    std::string reason;
    const cuda::Api* api = cuda::library(reason);
    if (api == nullptr) raise(Code::kNoKernel, reason);
    return *api;
}

py::dict cuda_info() {
    py::dict out;
    py::list devices;
    std::string reason;
    const cuda::Api* api = cuda::library(reason);
    int count = 0;
    if (api != nullptr) {
        const Status status = api->device_count(&count);
        if (!status.ok()) reason = status.what;
    }
    for (int i = 0; i < count; ++i) {
        cuda::DeviceInfo info;
        check(api->device_info(i, &info));
        py::dict device;
        device["name"] = info.name;
        device["compute_capability"] = info.compute_capability;
        device["multiprocessors"] = info.multiprocessors;
        device["memory_bytes"] = info.memory_bytes;
        devices.append(std::move(device));
    }
    out["library"] = api != nullptr;
    out["devices"] = devices;
    out["reason"] = reason;
    return out;
}

py::array_t<uint32_t> ternary_table(const Bytes& record_bytes, uint64_t expert) {
    const Record record = open_record_with(record_bytes, true, expert);
    py::array_t<uint32_t> table(4096);
    check(cuda::ternary_decoding_table(record.matrix(expert).spec, {table.mutable_data(), 4096}));
    return table;
}

void cuda_dequantize(const Bytes& record_bytes, uint64_t expert, uintptr_t record_on_device, uintptr_t table,
                     uintptr_t out, const std::string& dtype, uintptr_t stream) {
    const cuda::Api& api = required_library();
    const Record record = open_record_with(record_bytes, true, expert);
    const MatrixView view = record.matrix(expert);
    const auto type = dtype == "float32"    ? cuda::OutputType::kFloat32
                      : dtype == "float16"  ? cuda::OutputType::kFloat16
                      : dtype == "bfloat16" ? cuda::OutputType::kBfloat16
                                            : static_cast<cuda::OutputType>(255);
    cuda::DeviceMatrix matrix{};
    std::copy(view.spec.begin(), view.spec.end(), matrix.spec);
    matrix.data = reinterpret_cast<const uint8_t*>(record_on_device) + record.entries()[expert].offset;
    matrix.bytes = view.data.size();
    matrix.rows = view.rows;
    matrix.cols = view.cols;
    matrix.ternary_table = reinterpret_cast<const uint32_t*>(table);
    check(api.dequantize(matrix, reinterpret_cast<void*>(out), type, reinterpret_cast<void*>(stream)));
}

void cuda_round_block(const py::dict& block, const py::dict& grid, uintptr_t stream) {
    check(required_library().round_block(round_block_of(block, grid), reinterpret_cast<void*>(stream)));
}

void cuda_choose_grid(const py::dict& target, const py::dict& grid, uintptr_t stream) {
    check(required_library().choose_grid(choose_grid_of(target, grid), reinterpret_cast<void*>(stream)));
}

void cuda_ternary_sums(const py::dict& fields, uintptr_t stream) {
    check(required_library().ternary_sums(ternary_sums_of(fields), reinterpret_cast<void*>(stream)));
}

}  // namespace

void bind_cuda(py::module_& m) {
    m.def("cuda_info", &cuda_info, "Whether libqmoe_cuda could be opened, the devices it sees, and if not why.");
    m.def("ternary_table", &ternary_table, py::arg("record"), py::arg("expert"),
          "The decoding table of a ternary matrix, uint32 (4096,), as the CUDA kernels want it in device memory.");
    m.def("cuda_dequantize", &cuda_dequantize, py::arg("record"), py::arg("expert"), py::arg("record_on_device"),
          py::arg("table"), py::arg("out"), py::arg("dtype"), py::arg("stream"),
          "Decode one expert of a record whose bytes also lie on the device into out (N, K). Pointers and the stream "
          "are raw.");
    m.def("cuda_round_block", &cuda_round_block, py::arg("block"), py::arg("grid"), py::arg("stream"),
          "Round one block of columns with feedback on the device; fields and raw pointers as in qmoe/cuda.h.");
    m.def("cuda_ternary_sums", &cuda_ternary_sums, py::arg("fields"), py::arg("stream"),
          "Sums per row and counts per matrix of ternary codes on the device; fields as in qmoe/cuda.h.");
    m.def("cuda_choose_grid", &cuda_choose_grid, py::arg("target"), py::arg("grid"), py::arg("stream"),
          "Choose the int grid of one group of columns on the device; fields and raw pointers as in qmoe/cuda.h.");
}

}  // namespace qmoe::bind
