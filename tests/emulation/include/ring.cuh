// cuda/ring.cuh, emulated: copies are done when they are asked for.
#pragma once

#include <cstdint>

namespace qmoe::cuda {

inline constexpr uint32_t kBarrierBytes = 8;

class Ring {
  public:
    Ring(uint8_t* bytes, uint64_t*, uint32_t slot_bytes, uint32_t slots)
        : bytes_(bytes), slot_bytes_(slot_bytes), slots_(slots) {}
    void fill(uint32_t i, const uint8_t* from, uint32_t bytes) const { copy(bytes_ + i * slot_bytes_, from, bytes); }
    void refill(const uint8_t* from, uint32_t bytes) const { copy(bytes_ + index_ * slot_bytes_, from, bytes); }
    const uint8_t* front() const {
        __syncwarp();
        return bytes_ + index_ * slot_bytes_;
    }
    void advance() { index_ = index_ + 1 == slots_ ? 0 : index_ + 1; }

  private:
    static void copy(uint8_t* to, const uint8_t* from, uint32_t bytes) {
        if (emulation::lane() == 0) std::memcpy(to, from, bytes);
    }

    uint8_t* const bytes_;
    uint32_t index_ = 0;
    const uint32_t slot_bytes_, slots_;
};

}  // namespace qmoe::cuda
