// Copies from global to shared memory that a warp makes for itself, many at a time.
//
// A ring of slots of the same size, each with an mbarrier that tells when its bytes are there. From compute capability
// 9.0 on, one lane asks the copy engine for a whole slot; before, each lane copies its pieces of 16 bytes.
#pragma once

#include <cstdint>

namespace qmoe::cuda {

inline constexpr uint32_t kBarrierBytes = 8;

// Lets kernels that a stream has behind this one begin where there is room, before this one has ended. They must not
// touch what it writes, nor write what it reads, before wait_for_previous().
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Returns when all that came before in the stream is done and can be seen.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

class Ring {
  public:
    // `bytes` and `barriers` are this warp's own: slots * slot_bytes, 16-byte aligned, and slots * kBarrierBytes. Slot
    // sizes are multiples of 16.
    __device__ __forceinline__ Ring(uint8_t* bytes, uint64_t* barriers, uint32_t slot_bytes, uint32_t slots)
        : here_(bytes),
          begin_(bytes),
          end_(bytes + slots * slot_bytes),
          slot_bytes_(slot_bytes),
          barrier_(static_cast<uint32_t>(__cvta_generic_to_shared(barriers))),
          first_barrier_(barrier_) {
        if (threadIdx.x % 32 == 0) {
#pragma unroll 1
            for (uint32_t i = 0; i < slots; ++i)
                asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier_ + i * kBarrierBytes), "n"(kArrivals));
#if __CUDA_ARCH__ >= 900
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
        }
        __syncwarp();
    }

    // Slot i is to get slot_bytes from `from`. All lanes call; what was in it must have been read by all of them.
    __device__ __forceinline__ void fill(uint32_t i, const uint8_t* from) const {
        fill_at(first_barrier_ + i * kBarrierBytes, begin_ + i * slot_bytes_, from);
    }
    // The same for the slot that front() gave.
    __device__ __forceinline__ void refill(const uint8_t* from) const {
        fill_at(barrier_, here_, from);
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
            "}\n" ::"r"(barrier_),
            "r"(parity_)
            : "memory");
        return here_;
    }
    // On to the next slot.
    __device__ __forceinline__ void advance() {
        here_ += slot_bytes_, barrier_ += kBarrierBytes;
        if (here_ == end_) here_ = begin_, barrier_ = first_barrier_, parity_ ^= 1;
    }

  private:
#if __CUDA_ARCH__ >= 900
    static constexpr uint32_t kArrivals = 1;
#else
    static constexpr uint32_t kArrivals = 32;
#endif

    __device__ __forceinline__ void fill_at(uint32_t barrier, uint8_t* slot, const uint8_t* from) const {
        const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(slot));
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x % 32 == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(slot_bytes_)
                         : "memory");
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                "l"(from), "r"(slot_bytes_), "r"(barrier)
                : "memory");
        }
#else
        for (uint32_t i = threadIdx.x % 32 * 16; i < slot_bytes_; i += 32 * 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(from + i) : "memory");
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
    }

    uint8_t *here_, *const begin_, *const end_;
    const uint32_t slot_bytes_;
    uint32_t barrier_;
    const uint32_t first_barrier_;
    uint32_t parity_ = 0;
};

}  // namespace qmoe::cuda
