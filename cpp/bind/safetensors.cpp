#include "bind.h"

namespace qmoe::bind {

void bind_safetensors(pybind11::module_&) {}

}  // namespace qmoe::bind
