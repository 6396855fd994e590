#include "qmoe/status.h"

namespace qmoe {

const char* code_name(Code code) noexcept {
    switch (code) {
        case Code::kOk: return "OK";
        case Code::kTruncated: return "E_TRUNCATED";
        case Code::kMagic: return "E_MAGIC";
        case Code::kVersion: return "E_VERSION";
        case Code::kUnknown: return "E_UNKNOWN";
        case Code::kLimit: return "E_LIMIT";
        case Code::kOverflow: return "E_OVERFLOW";
        case Code::kOffset: return "E_OFFSET";
        case Code::kShape: return "E_SHAPE";
        case Code::kName: return "E_NAME";
        case Code::kChecksum: return "E_CHECKSUM";
        case Code::kCorrupt: return "E_CORRUPT";
        case Code::kDtype: return "E_DTYPE";
        case Code::kValue: return "E_VALUE";
        case Code::kMissing: return "E_MISSING";
        case Code::kNoSpace: return "E_NO_SPACE";
        case Code::kIo: return "E_IO";
        case Code::kNoKernel: return "E_NO_KERNEL";
    }
    return "E_UNKNOWN";
}

}  // namespace qmoe
