#include "qmoe/checkpoint.h"

#include <algorithm>

#include "open_file.h"
#include "shard_index.h"

namespace qmoe {
namespace {

void check(const Status& status, const std::string& file, std::string_view tensor = {}) {
    if (!status.ok()) throw Error(status, file, std::string(tensor));
}

}  // namespace

Checkpoint Checkpoint::open(const std::string& directory) {
    Checkpoint checkpoint;
    checkpoint.directory_ = directory;
    const std::string index_path = directory + "/model.safetensors.index.json";
    std::vector<uint8_t> json;
    const Status status = read_file(index_path, kMaxIndexBytes, json);
    if (status.code == Code::kMissing) {
        checkpoint.add(directory + "/model.safetensors");
        checkpoint.index_names();
        return checkpoint;
    }
    check(status, index_path);
    std::vector<std::pair<std::string, std::string>> weight_map;
    check(parse_shard_index(json, weight_map), index_path);

    std::vector<std::string> shards;
    for (const auto& [tensor, shard] : weight_map) shards.push_back(shard);
    std::sort(shards.begin(), shards.end());
    shards.erase(std::unique(shards.begin(), shards.end()), shards.end());
    for (const std::string& shard : shards) checkpoint.add(directory + "/" + shard);
    checkpoint.index_names();
    for (const auto& [tensor, shard] : weight_map) {
        const Located* const found = checkpoint.find(tensor);
        const std::string path = directory + "/" + shard;
        if (found == nullptr || checkpoint.files_[found->file].path() != path)
            throw Error(Status::error(Code::kMissing, "the index names a tensor that its shard lacks"), path, tensor);
    }
    return checkpoint;
}

void Checkpoint::add(const std::string& path) {
    std::string tensor;
    check(SafetensorsFile::open(path, files_.emplace_back(), &tensor), path, tensor);
}

void Checkpoint::index_names() {
    for (uint32_t f = 0; f < files_.size(); ++f)
        for (const TensorInfo& info : files_[f].tensors()) tensors_.push_back({&info, f});
    std::sort(tensors_.begin(), tensors_.end(),
              [](const Located& a, const Located& b) { return a.info->name < b.info->name; });
    for (size_t i = 1; i < tensors_.size(); ++i)
        if (tensors_[i - 1].info->name == tensors_[i].info->name)
            throw Error(Status::error(Code::kName, "two shards hold a tensor of this name"),
                        files_[tensors_[i].file].path(), tensors_[i].info->name);
}

const Checkpoint::Located* Checkpoint::find(std::string_view name) const noexcept {
    const auto found =
        std::lower_bound(tensors_.begin(), tensors_.end(), name,
                         [](const Located& t, std::string_view wanted) { return t.info->name < wanted; });
    return found != tensors_.end() && found->info->name == name ? &*found : nullptr;
}

const Checkpoint::Located& Checkpoint::locate(std::string_view name) const {
    const Located* const found = find(name);
    if (found == nullptr)
        throw Error(Status::error(Code::kMissing, "the checkpoint has no such tensor"), directory_, std::string(name));
    return *found;
}

const TensorInfo& Checkpoint::info(std::string_view name) const {
    return *locate(name).info;
}

std::vector<std::string> Checkpoint::names() const {
    std::vector<std::string> out;
    for (const Located& tensor : tensors_) out.push_back(tensor.info->name);
    return out;
}

std::vector<std::string> Checkpoint::packed_names() const {
    std::vector<std::string> out;
    for (const Located& tensor : tensors_)
        if (std::string_view(tensor.info->name).ends_with("_qmoe")) out.push_back(tensor.info->name);
    return out;
}

std::vector<uint8_t> Checkpoint::read(std::string_view name) const {
    const Located& tensor = locate(name);
    std::vector<uint8_t> out(tensor.info->bytes());
    check(files_[tensor.file].read(*tensor.info, 0, out), files_[tensor.file].path(), name);
    return out;
}

PackedTensor Checkpoint::packed(std::string_view name) const {
    const Located& tensor = locate(name);
    PackedTensor out;
    check(load_record(files_[tensor.file], *tensor.info, out.bytes_, out.record_), files_[tensor.file].path(), name);
    return out;
}

}  // namespace qmoe
