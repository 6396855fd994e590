// Runs CUDA kernels on the host, thread by thread: what they compute and where they read and write can be tested without a
// GPU. Every thread is a fiber that runs to its next barrier or exchange between lanes; one that never comes is reported as
// a deadlock. Included before everything else in CUDA sources that are compiled as C++.
//
// Not emulated: time, and memory that others see late. Races between barriers stay unseen, as do copies that are read too
// early and reads of what the kernel before has not finished: those are for compute-sanitizer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#undef __align__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#define __align__(n)
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define QMOE_SHARED_MEMORY(name, alignment) uint8_t* const name = emulation::shared_memory()
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaGetErrorString(...) "emulated"
#define cudaMemsetAsync(to, value, bytes, stream) (std::memset(to, value, bytes), cudaSuccess)

namespace emulation {

enum class State { kReady, kYielding, kAtWarpBarrier, kAtNamedBarrier, kAtBlockBarrier, kAtGridBarrier, kDone };

struct Fiber {
    ucontext_t context;
    uint3 thread, block;
    State state = State::kReady;
    int barrier = 0;  // of kAtNamedBarrier
    uint32_t barrier_threads = 0;
};

class Grid {
  public:
    static constexpr size_t kLanes = 32, kStackBytes = 96 << 10;
    static constexpr uint8_t kPoison = 0xEE;

    // Runs body() as `blocks` blocks of `threads` threads, with bytes of shared memory that hold a pattern at first. Throws
    // std::logic_error for a deadlock and for writes behind the shared memory.
    static void run(dim3 blocks, uint32_t threads, uint32_t shared_bytes, std::function<void()> body);

    static Grid& current() { return *current_; }
    Fiber& fiber() { return *running_; }
    uint32_t threads() const { return threads_; }
    uint32_t blocks() const { return blocks_; }
    uint8_t* shared() { return shared_of(running_->block.x); }
    uint8_t* shared_of(uint32_t block) { return shared_[block].data(); }
    void wait(State state) {
        running_->state = state;
        swapcontext(&running_->context, &main_);
    }
    // Lets others run: for those that look again and again at what others write.
    void yield() { wait(State::kYielding); }
    // Until `count` threads of the block are at barrier `id`.
    void wait_for(int id, uint32_t count) {
        running_->barrier = id, running_->barrier_threads = count;
        wait(State::kAtNamedBarrier);
    }
    // What all lanes of the warp give, by lane.
    std::vector<uint64_t> exchange(uint64_t value) {
        const size_t own = running_ - fibers_.data(), first = own / kLanes * kLanes;
        given_[own] = value;
        wait(State::kAtWarpBarrier);
        std::vector<uint64_t> all(given_.begin() + first, given_.begin() + first + kLanes);
        wait(State::kAtWarpBarrier);
        return all;
    }

  private:
    static void begin() {
        Grid& grid = current();
        grid.body_();
        grid.wait(State::kDone);
    }
    bool release(size_t first, size_t count, State state) {
        size_t waiting = 0, done = 0;
        for (size_t i = first; i < first + count; ++i) {
            waiting += fibers_[i].state == state ? 1 : 0;
            done += fibers_[i].state == State::kDone ? 1 : 0;
        }
        if (waiting == 0 || waiting + done < count) return false;
        for (size_t i = first; i < first + count; ++i)
            if (fibers_[i].state == state) fibers_[i].state = State::kReady;
        return true;
    }

    bool release_named(size_t first) {
        bool released = false;
        for (size_t i = first; i < first + threads_; ++i) {
            if (fibers_[i].state != State::kAtNamedBarrier) continue;
            std::vector<Fiber*> here;
            for (size_t j = first; j < first + threads_; ++j)
                if (fibers_[j].state == State::kAtNamedBarrier && fibers_[j].barrier == fibers_[i].barrier)
                    here.push_back(&fibers_[j]);
            if (here.size() < fibers_[i].barrier_threads) continue;
            for (Fiber* fiber : here) fiber->state = State::kReady;
            released = true;
        }
        return released;
    }

    static inline Grid* current_ = nullptr;
    // Of fibers; all grids use the same ones, one after the other.
    static inline std::unique_ptr<char[]> stacks_;
    static inline size_t stacks_there_ = 0;
    std::function<void()> body_;
    uint32_t threads_ = 0, blocks_ = 0;
    std::vector<Fiber> fibers_;
    std::vector<std::vector<uint8_t>> shared_;
    std::vector<uint64_t> given_;
    Fiber* running_ = nullptr;
    ucontext_t main_;
};

inline void Grid::run(dim3 blocks, uint32_t threads, uint32_t shared_bytes, std::function<void()> body) {
    constexpr size_t kGuard = 64;
    for (uint32_t i = 0; i < blocks.y * blocks.z; ++i) {
        Grid grid;
        current_ = &grid;
        grid.body_ = body, grid.threads_ = threads, grid.blocks_ = blocks.x;
        grid.shared_.assign(blocks.x, std::vector<uint8_t>(shared_bytes + kGuard, kPoison));
        grid.fibers_ = std::vector<Fiber>(blocks.x * threads);
        grid.given_.resize(grid.fibers_.size());
        if (grid.fibers_.size() > stacks_there_) {
            stacks_there_ = grid.fibers_.size();
            stacks_ = std::make_unique_for_overwrite<char[]>(stacks_there_ * kStackBytes);
        }
        for (size_t f = 0; f < grid.fibers_.size(); ++f) {
            Fiber& fiber = grid.fibers_[f];
            fiber.thread = {static_cast<uint32_t>(f % threads), 0, 0};
            fiber.block = {static_cast<uint32_t>(f / threads), i % blocks.y, i / blocks.y};
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = stacks_.get() + f * kStackBytes;
            fiber.context.uc_stack.ss_size = kStackBytes;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, &Grid::begin, 0);
        }
        size_t idle = 0;
        for (bool done = false; !done;) {
            bool progress = false;
            done = true;
            for (Fiber& fiber : grid.fibers_) {
                if (fiber.state == State::kReady || fiber.state == State::kYielding) {
                    const bool looked = fiber.state == State::kYielding;
                    grid.running_ = &fiber;
                    swapcontext(&grid.main_, &fiber.context);
                    progress |= !(looked && fiber.state == State::kYielding);
                }
                done = done && fiber.state == State::kDone;
            }
            for (size_t first = 0; first < grid.fibers_.size(); first += kLanes)
                progress |= grid.release(first, kLanes, State::kAtWarpBarrier);
            for (size_t first = 0; first < grid.fibers_.size(); first += threads)
                progress |= grid.release_named(first) | grid.release(first, threads, State::kAtBlockBarrier);
            progress |= grid.release(0, grid.fibers_.size(), State::kAtGridBarrier);
            idle = progress ? 0 : idle + 1;
            if (idle > 1 && !done) throw std::logic_error("emulation: deadlock");
        }
        for (const std::vector<uint8_t>& shared : grid.shared_)
            for (size_t i = shared_bytes; i < shared.size(); ++i)
                if (shared[i] != kPoison) throw std::logic_error("emulation: wrote behind the shared memory");
        current_ = nullptr;
    }
}

inline uint8_t* shared_memory() {
    return Grid::current().shared();
}

// What is in shared memory where `own` is in that of this block of threads, of block `rank` of the cluster; clusters are
// pairs.
template <typename T>
T* of_cluster(T* own, uint32_t rank) {
    constexpr uint32_t kCluster = 2;
    Grid& grid = Grid::current();
    const auto offset = reinterpret_cast<uint8_t*>(own) - grid.shared();
    return reinterpret_cast<T*>(grid.shared_of(grid.fiber().block.x / kCluster * kCluster + rank) + offset);
}

inline uint32_t lane() {
    return Grid::current().fiber().thread.x % Grid::kLanes;
}

template <typename T>
T from_lane(T value, uint32_t from) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = Grid::current().exchange(bits)[from];
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Size {
    uint32_t x;
};

}  // namespace emulation

#define threadIdx (emulation::Grid::current().fiber().thread)
#define blockIdx (emulation::Grid::current().fiber().block)
#define blockDim (emulation::Size{emulation::Grid::current().threads()})
#define gridDim (emulation::Size{emulation::Grid::current().blocks()})

inline void __syncthreads() {
    emulation::Grid::current().wait(emulation::State::kAtBlockBarrier);
}
inline void __syncwarp(uint32_t = ~0u) {
    emulation::Grid::current().wait(emulation::State::kAtWarpBarrier);
}
template <typename T>
T __shfl_sync(uint32_t, T value, uint32_t from) {
    return emulation::from_lane(value, from);
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, uint32_t other) {
    return emulation::from_lane(value, emulation::lane() ^ other);
}
template <typename T>
T __shfl_up_sync(uint32_t, T value, uint32_t by) {
    return emulation::from_lane(value, emulation::lane() >= by ? emulation::lane() - by : emulation::lane());
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
    return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    const float2 x = __bfloat1622float2(a), y = __bfloat1622float2(b), z = __bfloat1622float2(c);
    return __floats2bfloat162_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}
template <typename T>
T __ldcg(const T* from) {
    return *from;
}
template <typename T>
void __stcg(T* to, T value) {
    *to = value;
}
inline uint32_t __match_any_sync(uint32_t, uint32_t value) {
    uint32_t alike = 0;
    const std::vector<uint64_t> all = emulation::Grid::current().exchange(value);
    for (size_t i = 0; i < all.size(); ++i) alike |= static_cast<uint32_t>(all[i] == value) << i;
    return alike;
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t value) {
    for (const uint64_t other : emulation::Grid::current().exchange(value))
        value = other < value ? static_cast<uint32_t>(other) : value;
    return value;
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
    return ~__reduce_min_sync(~0u, ~value);
}
inline bool __any_sync(uint32_t, bool value) {
    return __reduce_max_sync(~0u, value ? 1 : 0) != 0;
}
inline bool __all_sync(uint32_t, bool value) {
    return __reduce_min_sync(~0u, value ? 1 : 0) != 0;
}
inline uint32_t __ballot_sync(uint32_t, bool value) {
    uint32_t votes = 0;
    const std::vector<uint64_t> all = emulation::Grid::current().exchange(value ? 1 : 0);
    for (size_t i = 0; i < all.size(); ++i) votes |= static_cast<uint32_t>(all[i] != 0) << i;
    return votes;
}
template <typename T>
T atomicAdd(T* to, T more) {
    const T before = *to;
    *to += more;
    return before;
}
inline uint32_t atomicOr(uint32_t* to, uint32_t bits) {
    const uint32_t before = *to;
    *to |= bits;
    return before;
}
inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) << shift % 32 >> 32);
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (uint32_t i = 0; i < 4; ++i)
        result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return result;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __expf(float x) {
    return std::exp(x);
}
inline uint32_t max(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}
inline uint32_t min(uint32_t a, uint32_t b) {
    return a < b ? a : b;
}
