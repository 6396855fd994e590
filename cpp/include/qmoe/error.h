// The one exception of the throwing layer (checkpoint.h). The core below it never throws a refusal: it returns a
// Status.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "qmoe/status.h"

namespace qmoe {

// What is wrong and where. what() shows all of it: "E_SHAPE: ... (expected 4, found 8) [file F, tensor T, offset 16]".
// Default visibility, so that it can be caught across shared libraries.
class [[gnu::visibility("default")]] Error : public std::runtime_error {
  public:
    explicit Error(const Status& status, std::string file = {}, std::string tensor = {});
    ~Error() override;

    Code code() const noexcept {
        return status_.code;
    }
    // Code, offset (bytes from the start of the file) and, where has_values, the expected and the actual value.
    const Status& status() const noexcept {
        return status_;
    }
    const std::string& file() const noexcept {
        return file_;
    }  // empty: not known
    const std::string& tensor() const noexcept {
        return tensor_;
    }  // empty: not known, or no tensor is concerned

  private:
    Status status_;
    std::string file_, tensor_;
};

}  // namespace qmoe
