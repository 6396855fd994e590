// cuda/barriers.cuh, emulated: copies are done when they are asked for.
#pragma once

#include <cstdint>

namespace qmoe::cuda {

struct Barrier {
    uint8_t arrivals, arrived, parity_of_phase;
    int32_t expected;  // bytes

    void init(uint32_t count) {
        arrivals = static_cast<uint8_t>(count), arrived = 0, parity_of_phase = 0, expected = 0;
    }
    void arrive() { arrive_expecting(1, 0); }
    void arrive_expecting(uint32_t count, uint32_t bytes) {
        expected += static_cast<int32_t>(bytes);
        arrived = static_cast<uint8_t>(arrived + count);
        complete(0);
    }
    // Bytes have come.
    void complete(uint32_t bytes) {
        expected -= static_cast<int32_t>(bytes);
        if (arrived == arrivals && expected == 0) arrived = 0, parity_of_phase ^= 1;
    }
    void arrive_at(uint32_t rank) { emulation::of_cluster(this, rank)->arrive(); }
    bool is_over(uint32_t parity) const { return parity_of_phase != parity; }
    void wait(uint32_t parity) const {
        while (!is_over(parity)) emulation::Grid::current().yield();
    }
};
static_assert(sizeof(Barrier) == 8);

inline uint32_t kept(uint32_t number) {
    return number;
}

template <int count>
void sync_threads(uint32_t id) {
    emulation::Grid::current().wait_for(static_cast<int>(id), count);
}

inline void sync_cluster() {
    emulation::Grid::current().wait(emulation::State::kAtGridBarrier);  // all clusters: none can tell
}

inline void raise_flag(uint64_t* flag, uint64_t value) {
    *flag = value;
}
inline void wait_for_flag(const uint64_t* flag, uint64_t value) {
    while (*flag != value) emulation::Grid::current().yield();
}

inline constexpr uint32_t kCopyArrivals = 1;

inline void copy_pieces(Barrier& full, uint8_t* to, const uint8_t* from, uint64_t stride, uint32_t bytes,
                        uint32_t count, uint32_t there) {
    if (emulation::lane() != 0) return;
    for (uint32_t i = 0; i < count; ++i) std::memcpy(to + i * bytes, from + std::min(i, there - 1) * stride, bytes);
    full.arrive();
}

inline void copy_16_if(bool wanted, uint8_t* to, const void* from, bool there) {
    if (!wanted) return;
    if (there)
        std::memcpy(to, from, 16);
    else
        std::memset(to, 0, 16);
}
inline void wait_for_copies() {}
inline void arrive_with_copies(Barrier& barrier) {
    barrier.arrive();
}
inline void publish_barriers() {}
inline void publish_to_async() {}
inline void publish_memory_to_async() {}

}  // namespace qmoe::cuda
