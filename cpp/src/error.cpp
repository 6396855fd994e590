#include "qmoe/error.h"

#include <utility>

namespace qmoe {
namespace {

std::string describe(const Status& status, const std::string& file, const std::string& tensor) {
    std::string text = std::string(code_name(status.code)) + ": " + status.what;
    if (status.has_values)
        text += " (expected " + std::to_string(status.expected) + ", found " + std::to_string(status.actual) + ")";
    text += " [";
    if (!file.empty()) text += "file " + file + ", ";
    if (!tensor.empty()) text += "tensor " + tensor + ", ";
    return text + "offset " + std::to_string(status.offset) + "]";
}

}  // namespace

Error::Error(const Status& status, std::string file, std::string tensor)
    : std::runtime_error(describe(status, file, tensor)),
      status_(status),
      file_(std::move(file)),
      tensor_(std::move(tensor)) {}

// Out of line, so that the type information has one home.
Error::~Error() = default;

}  // namespace qmoe
