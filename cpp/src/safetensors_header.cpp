#include "safetensors_header.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>

#include "json.h"
#include "qmoe/checked.h"

namespace qmoe {
namespace {

struct Dtype {
    const char* name;
    uint32_t bits;
};
constexpr Dtype kDtypes[] = {
    {"BOOL", 8},        {"U8", 8},          {"I8", 8},    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8},
    {"F8_E5M2FNUZ", 8}, {"F8_E4M3FNUZ", 8}, {"F4", 4},    {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"I16", 16},
    {"U16", 16},        {"F16", 16},        {"BF16", 16}, {"I32", 32},    {"U32", 32},    {"F32", 32},
    {"C64", 64},        {"F64", 64},        {"I64", 64},  {"U64", 64},
};

// The shortest entry is `"x":{"dtype":"U8","shape":[],"data_offsets":[0,1]},`: the limit on the header already keeps
// the number of tensors far below its own limit, which the index of a sharded checkpoint can still reach.
constexpr uint64_t kShortestEntry = 49;
static_assert(kMaxHeaderBytes / kShortestEntry < kMaxTensors);

class HeaderParser {
  public:
    HeaderParser(std::span<const uint8_t> json, uint64_t data_bytes, SafetensorsHeader& out, std::string& tensor)
        : json_(json),
          scan_(json, kHeaderAt),
          data_at_(kHeaderAt + json.size()),
          data_bytes_(data_bytes),
          out_(out),
          tensor_(tensor) {}

    Status run() {
        // Reserved exactly, so that a vector growing by doubling cannot break the promise about memory.
        const auto objects = static_cast<uint64_t>(std::count(json_.begin(), json_.end(), uint8_t{'{'}));
        out_.tensors.reserve(std::min(objects, json_.size() / kShortestEntry + 1));
        QMOE_TRY(scan_.expect('{'));
        if (!scan_.accept('}')) {
            do QMOE_TRY(member());
            while (scan_.accept(','));
            QMOE_TRY(scan_.expect('}'));
        }
        QMOE_TRY(scan_.end());
        QMOE_TRY(check_tiling());
        return index_names();
    }

  private:
    Status member() {
        TensorInfo info;  // begin and end count from the start of the data until check_tiling
        const uint64_t at = scan_.offset();
        QMOE_TRY(scan_.string(info.name));
        QMOE_TRY(scan_.expect(':'));
        if (info.name == "__metadata__") return metadata();
        QMOE_TRY(check_name(info.name, at));
        const Status status = tensor(info);
        if (!status.ok()) {
            tensor_ = info.name;
            return status;
        }
        out_.tensors.push_back(std::move(info));
        return {};
    }

    Status metadata() {
        if (has_metadata_) return Status::error(Code::kName, "safetensors: __metadata__ occurs twice", scan_.offset());
        has_metadata_ = true;
        QMOE_TRY(scan_.expect('{'));
        if (scan_.accept('}')) return {};
        do {
            if (out_.metadata.size() == kMaxMetadata)
                return Status::mismatch(Code::kLimit, "safetensors: too many metadata entries", scan_.offset(),
                                        kMaxMetadata, kMaxMetadata + 1);
            auto& [key, value] = out_.metadata.emplace_back();
            QMOE_TRY(scan_.string(key));
            QMOE_TRY(scan_.expect(':'));
            QMOE_TRY(scan_.string(value));
        } while (scan_.accept(','));
        QMOE_TRY(scan_.expect('}'));
        std::vector<uint32_t> order(out_.metadata.size());
        std::iota(order.begin(), order.end(), 0u);
        std::sort(order.begin(), order.end(),
                  [&](uint32_t a, uint32_t b) { return out_.metadata[a].first < out_.metadata[b].first; });
        for (size_t i = 1; i < order.size(); ++i)
            if (out_.metadata[order[i - 1]].first == out_.metadata[order[i]].first)
                return Status::error(Code::kName, "safetensors: a metadata key occurs twice", scan_.offset());
        return {};
    }

    Status tensor(TensorInfo& info) {
        constexpr uint32_t kDtype = 1, kShape = 2, kOffsets = 4;
        const uint64_t begin = scan_.offset();
        uint32_t bits = 0, seen = 0;
        std::string field;
        QMOE_TRY(scan_.expect('{'));
        do {
            QMOE_TRY(scan_.string(field));
            const uint64_t at = scan_.offset();
            const uint32_t flag = field == "dtype"          ? kDtype
                                  : field == "shape"        ? kShape
                                  : field == "data_offsets" ? kOffsets
                                                            : 0;
            if (flag == 0) return Status::error(Code::kUnknown, "safetensors: unknown field of a tensor", at);
            if ((seen & flag) != 0)
                return Status::error(Code::kName, "safetensors: a field of a tensor occurs twice", at);
            seen |= flag;
            QMOE_TRY(scan_.expect(':'));
            if (flag == kDtype) QMOE_TRY(dtype(info, bits));
            if (flag == kShape) QMOE_TRY(shape(info));
            if (flag == kOffsets) QMOE_TRY(offsets(info));
        } while (scan_.accept(','));
        QMOE_TRY(scan_.expect('}'));
        if (seen != (kDtype | kShape | kOffsets))
            return Status::error(Code::kCorrupt, "safetensors: a tensor lacks dtype, shape or data_offsets", begin);
        return check_size(info, bits, begin);
    }

    Status dtype(TensorInfo& info, uint32_t& bits) {
        const uint64_t at = scan_.offset();
        std::string name;
        QMOE_TRY(scan_.string(name));
        for (const Dtype& known : kDtypes)
            if (name == known.name) {
                info.dtype = known.name;
                bits = known.bits;
                return {};
            }
        return Status::error(Code::kUnknown, "safetensors: unknown dtype", at);
    }

    Status shape(TensorInfo& info) {
        QMOE_TRY(scan_.expect('['));
        if (scan_.accept(']')) return {};
        do {
            if (info.rank == kMaxRank)
                return Status::mismatch(Code::kLimit, "safetensors: too many dimensions", scan_.offset(), kMaxRank,
                                        kMaxRank + 1);
            QMOE_TRY(scan_.number(info.dims[info.rank]));
            ++info.rank;
        } while (scan_.accept(','));
        return scan_.expect(']');
    }

    Status offsets(TensorInfo& info) {
        const uint64_t at = scan_.offset();
        QMOE_TRY(scan_.expect('['));
        QMOE_TRY(scan_.number(info.begin));
        QMOE_TRY(scan_.expect(','));
        QMOE_TRY(scan_.number(info.end));
        QMOE_TRY(scan_.expect(']'));
        if (info.begin > info.end)
            return Status::mismatch(Code::kOffset, "safetensors: a tensor ends before it begins", at, info.begin,
                                    info.end);
        return {};
    }

    static Status check_size(const TensorInfo& info, uint32_t bits, uint64_t at) noexcept {
        uint64_t size = 1;
        for (const uint64_t dim : info.shape())
            if (!checked_mul(size, dim, size))
                return Status::error(Code::kOverflow, "safetensors: the shape's product exceeds 64 bits", at);
        if (!checked_mul(size, bits, size))
            return Status::error(Code::kOverflow, "safetensors: the size in bits exceeds 64 bits", at);
        if (size % 8 != 0)
            return Status::error(Code::kShape, "safetensors: the tensor is not a whole number of bytes", at);
        if (size / 8 != info.bytes())
            return Status::mismatch(Code::kShape, "safetensors: data_offsets contradict shape and dtype", at, size / 8,
                                    info.bytes());
        return {};
    }

    // The tensors, in the order of their data, cover it from first to last byte; those without bytes may lie on any
    // seam.
    Status check_tiling() {
        std::sort(out_.tensors.begin(), out_.tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
            return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
        });
        uint64_t covered = 0;
        for (TensorInfo& info : out_.tensors) {
            Status status;
            if (info.begin != covered)
                status = Status::mismatch(
                    Code::kOffset,
                    info.begin < covered ? "safetensors: tensors overlap" : "safetensors: a gap before a tensor",
                    data_at_ + covered, covered, info.begin);
            else if (info.end > data_bytes_)
                status = Status::mismatch(Code::kTruncated, "safetensors: the file ends before this tensor does",
                                          data_at_ + data_bytes_, info.end, data_bytes_);
            if (!status.ok()) {
                tensor_ = info.name;
                return status;
            }
            covered = info.end;
            info.begin += data_at_;  // no overflow: both are inside the file now
            info.end += data_at_;
        }
        if (covered != data_bytes_)
            return Status::mismatch(Code::kOffset, "safetensors: bytes after the last tensor", data_at_ + covered,
                                    covered, data_bytes_);
        return {};
    }

    // By sorting: no choice of names makes that quadratic, as it could make a hash table.
    Status index_names() {
        out_.by_name.resize(out_.tensors.size());
        std::iota(out_.by_name.begin(), out_.by_name.end(), 0u);
        std::sort(out_.by_name.begin(), out_.by_name.end(),
                  [&](uint32_t a, uint32_t b) { return out_.tensors[a].name < out_.tensors[b].name; });
        for (size_t i = 1; i < out_.by_name.size(); ++i)
            if (const TensorInfo& info = out_.tensors[out_.by_name[i]];
                out_.tensors[out_.by_name[i - 1]].name == info.name) {
                tensor_ = info.name;
                return Status::error(Code::kName, "safetensors: a tensor's name occurs twice", kHeaderAt);
            }
        return {};
    }

    std::span<const uint8_t> json_;
    JsonScanner scan_;
    uint64_t data_at_, data_bytes_;
    SafetensorsHeader& out_;
    std::string& tensor_;
    bool has_metadata_ = false;
};

}  // namespace

Status check_name(std::string_view name, uint64_t offset) noexcept {
    if (name.empty()) return Status::error(Code::kName, "safetensors: an empty name", offset);
    if (name.size() > kMaxNameBytes)
        return Status::mismatch(Code::kLimit, "safetensors: a name is too long", offset, kMaxNameBytes, name.size());
    for (const char c : name)
        if (static_cast<uint8_t>(c) < 0x20 || c == 0x7F || c == '/' || c == '\\')
            return Status::error(Code::kName, "safetensors: a name holds a slash or a control character", offset);
    if (name.find("..") != std::string_view::npos)
        return Status::error(Code::kName, "safetensors: a name holds two dots in a row", offset);
    return {};
}

Status parse_safetensors_header(std::span<const uint8_t> json, uint64_t data_bytes, SafetensorsHeader& out,
                                std::string& tensor) {
    out = {};
    return HeaderParser(json, data_bytes, out, tensor).run();
}

}  // namespace qmoe
