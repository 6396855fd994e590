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

template <uint32_t threads>
struct SharedCopy {
    static constexpr uint32_t kArrivals = 1;
    static bool takes_part(uint32_t thread) { return thread == 0; }
    static void begin(Barrier& full, uint8_t* to, const uint8_t* from, uint32_t bytes, uint32_t) {
        std::memcpy(to, from, bytes);
        full.arrive();
    }
};

inline void bring_near(const void*) {}
inline void publish_to_copies() {}

}  // namespace qmoe::cuda
