#include "qmoe/format.h"

namespace qmoe {

#define QMOE_FORMAT(stem) extern const Format format_##stem;
#include "formats.def"
#undef QMOE_FORMAT

namespace {
constexpr const Format* kFormats[] = {
#define QMOE_FORMAT(stem) &format_##stem,
#include "formats.def"
#undef QMOE_FORMAT
};
}  // namespace

std::span<const Format* const> formats() noexcept {
    return kFormats;
}

const Format* find_format(uint16_t id) noexcept {
    for (const Format* format : kFormats)
        if (format->id == id) return format;
    return nullptr;
}

}  // namespace qmoe
