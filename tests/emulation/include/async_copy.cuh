// cuda/async_copy.cuh, emulated: copies are done when they are asked for, or when they are waited for.
#pragma once

#include <cstdint>

namespace qmoe::cuda {

template <int kBytes>
void copy_async(uint8_t* shared, const uint8_t* global) {
    if (emulation::Grid::late_copies)
        emulation::Grid::current().fiber().open_copies.push_back({shared, global, kBytes});
    else
        std::memcpy(shared, global, kBytes);
}

inline void end_copies() {
    emulation::Fiber& fiber = emulation::Grid::current().fiber();
    fiber.group_copies.push_back(std::move(fiber.open_copies));
    fiber.open_copies.clear();
}

template <int kLater>
void wait_for_copies() {
    auto& groups = emulation::Grid::current().fiber().group_copies;
    for (; groups.size() > kLater; groups.pop_front())
        for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace qmoe::cuda
