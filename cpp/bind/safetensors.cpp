// SafetensorsFile as Python sees it. Bytes go straight into new arrays; the GIL is released while the system reads.
#include "qmoe/safetensors.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "bind.h"

namespace py = pybind11;

namespace qmoe::bind {
namespace {

py::dict where(const std::string& path, const std::string& tensor = {}) {
    py::dict out;
    // As Python spells file names that are no UTF-8.
    out["file"] = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<py::ssize_t>(path.size())));
    if (!tensor.empty()) out["tensor"] = tensor;
    return out;
}

std::string file_system_path(const py::object& path) {
    PyObject* encoded = nullptr;
    if (!PyUnicode_FSConverter(path.ptr(), &encoded)) throw py::error_already_set();
    return py::reinterpret_steal<py::bytes>(encoded);
}

class PySafetensorsFile {
  public:
    explicit PySafetensorsFile(const py::object& path_object) : path_(file_system_path(path_object)) {
        auto file = std::make_shared<SafetensorsFile>();
        std::string tensor;
        Status status;
        {
            const py::gil_scoped_release release;
            status = SafetensorsFile::open(path_, *file, &tensor);
        }
        if (!status.ok()) check(status, where(path_, tensor));
        for (const TensorInfo& info : file->tensors()) {
            py::tuple shape(info.rank);
            for (uint32_t i = 0; i < info.rank; ++i) shape[i] = info.dims[i];
            tensors_[py::str(info.name)] = py::make_tuple(info.dtype, shape, info.begin, info.end);
        }
        for (const auto& [key, value] : file->metadata()) metadata_[py::str(key)] = value;
        file_ = std::move(file);
    }

    const py::dict& tensors() const { return tensors_; }
    const py::dict& metadata() const { return metadata_; }
    py::object path() const { return where(path_)["file"]; }
    void close() { file_.reset(); }

    py::array_t<uint8_t> read(const std::string& name) const {
        const auto file = opened(name);
        const TensorInfo& info = find(*file, name);
        return range(*file, info, 0, info.bytes());
    }

    py::array_t<uint8_t> read_range(const std::string& name, uint64_t begin, uint64_t count) const {
        const auto file = opened(name);
        const TensorInfo& info = find(*file, name);
        // Before the array exists: a refused range must not cost memory.
        if (begin > info.bytes() || count > info.bytes() - begin)
            check(Status::mismatch(Code::kValue, "safetensors: range outside the tensor", info.begin, info.bytes(),
                                   begin + count),
                  where(path_, name));
        return range(*file, info, begin, count);
    }

  private:
    // A copy of the pointer, so that close() in another thread cannot close a file that is being read.
    std::shared_ptr<const SafetensorsFile> opened(const std::string& name) const {
        if (!file_) raise(Code::kIo, "the file is closed", where(path_, name));
        return file_;
    }
    const TensorInfo& find(const SafetensorsFile& file, const std::string& name) const {
        const TensorInfo* const info = file.find(name);
        if (info == nullptr) raise(Code::kMissing, "the file has no such tensor", where(path_, name));
        return *info;
    }
    py::array_t<uint8_t> range(const SafetensorsFile& file, const TensorInfo& info, uint64_t begin,
                               uint64_t count) const {
        py::array_t<uint8_t> out(static_cast<py::ssize_t>(count));
        uint8_t* const data = out.mutable_data();
        Status status;
        {
            const py::gil_scoped_release release;
            status = file.read(info, begin, {data, static_cast<size_t>(count)});
        }
        if (!status.ok()) check(status, where(path_, info.name));
        return out;
    }

    std::string path_;
    std::shared_ptr<const SafetensorsFile> file_;
    py::dict tensors_, metadata_;
};

}  // namespace

void bind_safetensors(py::module_& m) {
    py::class_<PySafetensorsFile>(m, "SafetensorsFile",
                                  "A safetensors file, opened by the strict reader; a context manager.")
        .def(py::init<const py::object&>(), py::arg("path"))
        .def_property_readonly(
            "tensors", &PySafetensorsFile::tensors,
            "dict in file order: name -> (dtype, shape, begin, end), byte offsets from the start of the file.")
        .def_property_readonly("metadata", &PySafetensorsFile::metadata, "dict of strings: the header's __metadata__.")
        .def_property_readonly("path", &PySafetensorsFile::path)
        .def("read", &PySafetensorsFile::read, py::arg("name"), "All bytes of a tensor, uint8 (bytes,).")
        .def("read_range", &PySafetensorsFile::read_range, py::arg("name"), py::arg("begin"), py::arg("count"),
             "Bytes [begin, begin + count) of a tensor, uint8 (count,).")
        .def("close", &PySafetensorsFile::close)
        .def("__enter__", [](py::object self) { return self; })
        .def("__exit__", [](PySafetensorsFile& self, const py::args&) { self.close(); });
}

}  // namespace qmoe::bind
