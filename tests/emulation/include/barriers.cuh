// cuda/barriers.cuh, emulated: copies are done when they are asked for.
#pragma once

#include <cstdint>

namespace qmoe::cuda {

struct Barrier {
    uint16_t arrivals, arrived;
    uint32_t phase;

    void init(uint32_t count) { arrivals = static_cast<uint16_t>(count), arrived = 0, phase = 0; }
    void arrive() {
        if (++arrived == arrivals) arrived = 0, ++phase;
    }
    void arrive_after_copies() { arrive(); }
    bool is_over(uint32_t parity) const { return phase % 2 != parity; }
    void wait(uint32_t parity) const {
        while (!is_over(parity)) emulation::Grid::current().yield();
    }
};
static_assert(sizeof(Barrier) == 8);

template <int id, int count>
void sync_threads() {
    emulation::Grid::current().wait_for(id, count);
}

inline void copy_16(void* to, const void* from) {
    std::memcpy(to, from, 16);
}

}  // namespace qmoe::cuda
