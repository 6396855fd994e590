// cuda/tensor_map.cuh, emulated: copies are done when they are asked for.
#pragma once

#include "barriers.cuh"
#include "common.cuh"

namespace qmoe::cuda {

struct TensorMap {
    static constexpr uint32_t kBoxColumns = 64;
    const uint16_t* numbers;
    uint32_t rows, cols, box_rows;

    static bool are_there(bool) noexcept { return true; }
    static bool fits(const void* from, uint32_t of_cols) noexcept {
        return reinterpret_cast<uintptr_t>(from) % 16 == 0 && of_cols % 8 == 0;
    }
    Status make(const void* from, uint32_t of_rows, uint32_t of_cols, uint32_t rows_of_box) noexcept {
        numbers = static_cast<const uint16_t*>(from), rows = of_rows, cols = of_cols, box_rows = rows_of_box;
        return {};
    }
};

template <uint32_t kCluster>
void copy_box(Barrier& full, uint8_t* to, const TensorMap& map, uint32_t col, uint32_t row) {
    for (uint32_t i = 0; i < kCluster; ++i) {
        uint8_t* const there = kCluster == 1 ? to : emulation::of_cluster(to, i);
        for (uint32_t r = 0; r < map.box_rows; ++r)
            for (uint32_t c = 0; c < TensorMap::kBoxColumns; ++c) {
                const bool has = row + r < map.rows && col + c < map.cols;
                const uint16_t number = has ? map.numbers[uint64_t{row + r} * map.cols + col + c] : uint16_t{0};
                std::memcpy(there + r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2, &number, 2);
            }
        (kCluster == 1 ? &full : emulation::of_cluster(&full, i))->complete(map.box_rows * 128);
    }
}

}  // namespace qmoe::cuda
