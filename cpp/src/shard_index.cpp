#include "shard_index.h"

#include <algorithm>

#include "json.h"
#include "qmoe/safetensors.h"
#include "safetensors_header.h"

namespace qmoe {
namespace {

Status weight_map(JsonScanner& scan, std::vector<std::pair<std::string, std::string>>& out) {
    QMOE_TRY(scan.expect('{'));
    if (scan.accept('}')) return {};
    do {
        if (out.size() == kMaxTensors)
            return Status::mismatch(Code::kLimit, "index: too many tensors", scan.offset(), kMaxTensors,
                                    kMaxTensors + 1);
        auto& [tensor, shard] = out.emplace_back();
        const uint64_t at = scan.offset();
        QMOE_TRY(scan.string(tensor));
        QMOE_TRY(check_name(tensor, at));
        QMOE_TRY(scan.expect(':'));
        const uint64_t shard_at = scan.offset();
        QMOE_TRY(scan.string(shard));
        QMOE_TRY(check_name(shard, shard_at));
    } while (scan.accept(','));
    return scan.expect('}');
}

}  // namespace

Status parse_shard_index(std::span<const uint8_t> json, std::vector<std::pair<std::string, std::string>>& out) {
    out.clear();
    JsonScanner scan(json);
    bool found = false;
    std::string key;
    QMOE_TRY(scan.expect('{'));
    if (!scan.accept('}')) {
        do {
            QMOE_TRY(scan.string(key));
            QMOE_TRY(scan.expect(':'));
            if (key != "weight_map") {
                QMOE_TRY(scan.skip_value());
            } else if (found) {
                return Status::error(Code::kName, "index: weight_map occurs twice", scan.offset());
            } else {
                found = true;
                QMOE_TRY(weight_map(scan, out));
            }
        } while (scan.accept(','));
        QMOE_TRY(scan.expect('}'));
    }
    QMOE_TRY(scan.end());
    if (!found) return Status::error(Code::kCorrupt, "index: no weight_map");
    std::sort(out.begin(), out.end());
    const auto same = [](const auto& a, const auto& b) { return a.first == b.first; };
    if (std::adjacent_find(out.begin(), out.end(), same) != out.end())
        return Status::error(Code::kName, "index: a tensor's name occurs twice");
    return {};
}

}  // namespace qmoe
