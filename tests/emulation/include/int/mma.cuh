// cuda/int/mma.cuh, emulated: what lanes hold of the operands, as PTX's description of mma.m16n8k16 says.
#pragma once

#include "common.cuh"

namespace qmoe::cuda {

template <typename T>
float half_of(uint64_t word, uint32_t upper) {
    const uint16_t bits = static_cast<uint16_t>(word >> (16 * upper));
    T value;
    std::memcpy(&value, &bits, sizeof bits);
    return static_cast<float>(value);
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::Grid& grid = emulation::Grid::current();
    const auto lower = grid.exchange(uint64_t{a[1]} << 32 | a[0]), upper = grid.exchange(uint64_t{a[3]} << 32 | a[2]),
               b = grid.exchange(uint64_t{b1} << 32 | b0);
    const uint32_t g = emulation::lane() / 4, t = emulation::lane() % 4;
    for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t row = i / 2, col = 2 * t + i % 2;  // row: g or g + 8
        float sum = 0.0f;
        for (uint32_t k = 0; k < 16; ++k) {
            const uint64_t of_a = k < 8 ? lower[4 * g + k % 8 / 2] : upper[4 * g + k % 8 / 2];
            const uint64_t of_b = b[4 * col + k % 8 / 2];
            sum += half_of<T>(of_a >> (32 * row), k % 2) * half_of<T>(of_b >> (k < 8 ? 0 : 32), k % 2);
        }
        d[i] += sum;
    }
}

inline uint4 load_matrices(const uint8_t* row) {
    const auto rows = emulation::Grid::current().exchange(reinterpret_cast<uint64_t>(row));
    uint32_t words[4];
    for (uint32_t i = 0; i < 4; ++i)
        std::memcpy(words + i,
                    reinterpret_cast<const uint8_t*>(rows[8 * i + emulation::lane() / 4]) + emulation::lane() % 4 * 4,
                    4);
    return {words[0], words[1], words[2], words[3]};
}

}  // namespace qmoe::cuda
