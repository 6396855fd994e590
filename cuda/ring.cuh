// Copies from global to shared memory that a warp makes for itself, many at a time.
//
// A ring of slots of the same size, each with an mbarrier that tells when its bytes are there. From compute capability
// 9.0 on, one lane asks the copy engine for a whole slot; before, each lane copies its pieces of 16 bytes.
#pragma once

#include <cstdint>

#include "barriers.cuh"

namespace qmoe::cuda {

inline constexpr uint32_t kBarrierBytes = 8;

class Ring {
  public:
    // `bytes` and `barriers` are this warp's own: slots * slot_bytes, 16-byte aligned, and slots * kBarrierBytes.
    __device__ __forceinline__ Ring(uint8_t* bytes, uint64_t* barriers, uint32_t slot_bytes, uint32_t slots)
        : bytes_(bytes), slot_bytes_(slot_bytes), slots_(slots), barriers_(shared_address(barriers)) {
        if (threadIdx.x % 32 == 0) {
#pragma unroll 1
            for (uint32_t i = 0; i < slots; ++i)
                asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barriers_ + i * kBarrierBytes), "n"(kArrivals));
#if __CUDA_ARCH__ >= 900
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
        }
        __syncwarp();
    }

    // Slot i, that has not been filled before, is to get `bytes`, a multiple of 16, from `from`. All lanes call.
    __device__ __forceinline__ void fill(uint32_t i, const uint8_t* from, uint32_t bytes) const {
        fill_at(barriers_ + i * kBarrierBytes, shared_address(bytes_ + i * slot_bytes_), from, bytes);
    }
    // The same for the slot that front() gave, of which all lanes have read what they wanted.
    __device__ __forceinline__ void refill(const uint8_t* from, uint32_t bytes) const {
        fill_at(barriers_ + index_ * kBarrierBytes, shared_address(bytes_ + at_), from, bytes);
    }

    // The oldest slot's bytes, once they are there.
    __device__ __forceinline__ const uint8_t* front() const {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
#if __CUDA_ARCH__ >= 900
            "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
#else
            "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
#endif
            "@!done bra again;\n"
            "}\n" ::"r"(barriers_ + index_ * kBarrierBytes),
            "r"(parity_)
            : "memory");
        return bytes_ + at_;
    }
    // On to the next slot.
    __device__ __forceinline__ void advance() {
        at_ += slot_bytes_;
        if (++index_ == slots_) index_ = 0, at_ = 0, parity_ ^= 1;
    }

  private:
#if __CUDA_ARCH__ >= 900
    static constexpr uint32_t kArrivals = 1;
#else
    static constexpr uint32_t kArrivals = 32;
#endif

    static __device__ __forceinline__ void fill_at(uint32_t barrier, uint32_t to, const uint8_t* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x % 32 == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                "l"(from), "r"(bytes), "r"(barrier)
                : "memory");
        }
#else
        for (uint32_t i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(from + i) : "memory");
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
    }

    uint8_t* const bytes_;
    uint32_t at_ = 0, index_ = 0, parity_ = 0;
    const uint32_t slot_bytes_, slots_, barriers_;
};

}  // namespace qmoe::cuda
