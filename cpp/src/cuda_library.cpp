#include "qmoe/cuda_library.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "formats/ternary.h"
#include "qmoe/cuda.h"

namespace qmoe::cuda {
namespace {

struct Loaded {
    const Api* api = nullptr;
    std::string reason;

    Loaded() {
        constexpr const char* kName = "libqmoe_cuda.so";
        std::string path = kName;
        if (const char* named = std::getenv("QMOE_CUDA_LIBRARY")) {
            path = named;
        } else if (Dl_info self; dladdr(reinterpret_cast<void*>(&library), &self) != 0 && self.dli_fname != nullptr) {
            const std::string own = self.dli_fname;
            if (const size_t slash = own.rfind('/'); slash != std::string::npos) {
                const std::string beside = own.substr(0, slash + 1) + kName;
                if (void* found = dlopen(beside.c_str(), RTLD_NOW | RTLD_LOCAL)) {
                    take(found, beside);
                    return;
                }
            }
        }
        void* found = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (found == nullptr) {
            reason = std::string("the CUDA library could not be opened: ") + dlerror();
            return;
        }
        take(found, path);
    }

    void take(void* handle, const std::string& path) {
        using GetApi = const Api* (*)() noexcept;
        const auto get = reinterpret_cast<GetApi>(dlsym(handle, "qmoe_cuda_api"));
        const Api* found = get == nullptr ? nullptr : get();
        if (found == nullptr || found->version != kApiVersion) {
            reason = path + " is of another version of this library";
            return;
        }
        api = found;
    }
};

}  // namespace

const Api* library(std::string& reason) {
    static const Loaded loaded;
    reason = loaded.reason;
    return loaded.api;
}

Status ternary_decoding_table(std::span<const uint8_t, kSpecBytes> spec, std::span<uint32_t> out) noexcept {
    if (load<uint16_t>(spec.data()) != kTernaryId) return Status::error(Code::kUnknown, "not a ternary spec");
    if (out.size() != kStates) return Status::mismatch(Code::kShape, "ternary table", 0, kStates, out.size());
    const TernaryTable table(spec.data());
    std::copy(table.entry.begin(), table.entry.end(), out.begin());
    return {};
}

Status ternary_encoding_tables(std::span<const uint8_t, kSpecBytes> spec, std::vector<uint8_t>& out) {
    QMOE_TRY(check_ternary_spec(spec.data()));
    const TernaryEncodingTables tables(spec.data());
    out.resize(sizeof tables);
    std::memcpy(out.data(), &tables, sizeof tables);
    return {};
}

}  // namespace qmoe::cuda
