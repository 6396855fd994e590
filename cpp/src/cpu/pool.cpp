#include "cpu/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qmoe {
namespace {

void relax() noexcept {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A layer is a few loops that take tens of microseconds each, and waking a sleeping thread takes as long. So workers
// look for the next loop for about 20 microseconds before they sleep.
constexpr int kSpins = 1000;
constexpr uint64_t kMaxThreads = 1024;

// The tasks that a thread still has: [begin, end) in one word. Its owner takes from the front, so that it walks through
// memory in order; who has none left takes half of another's from the back.
struct alignas(64) Range {
    std::atomic<uint64_t> bounds{0};

    static uint64_t pack(uint64_t begin, uint64_t end) noexcept { return begin << 32 | end; }
    static uint64_t begin(uint64_t bounds) noexcept { return bounds >> 32; }
    static uint64_t end(uint64_t bounds) noexcept { return bounds & 0xffffffffu; }

    bool take(uint64_t& task) noexcept {
        uint64_t now = bounds.load(std::memory_order_relaxed);
        while (begin(now) < end(now)) {
            if (bounds.compare_exchange_weak(now, pack(begin(now) + 1, end(now)), std::memory_order_relaxed)) {
                task = begin(now);
                return true;
            }
        }
        return false;
    }
    bool steal(Range& thief) noexcept {
        uint64_t now = bounds.load(std::memory_order_relaxed);
        while (begin(now) < end(now)) {
            const uint64_t middle = end(now) - (end(now) - begin(now) + 1) / 2;
            if (bounds.compare_exchange_weak(now, pack(begin(now), middle), std::memory_order_relaxed)) {
                thief.bounds.store(pack(middle, end(now)), std::memory_order_relaxed);
                return true;
            }
        }
        return false;
    }
};

class Pool {
  public:
    void run(uint64_t count, int threads, const std::function<void(uint64_t)>& body) {
        const std::lock_guard turn(turn_);
        for (uint64_t first = 0; first < count; first += kMost) {
            const uint64_t some = std::min(kMost, count - first);
            run_some(first, some, std::min<uint64_t>(some, static_cast<uint64_t>(threads)), body);
        }
    }

  private:
    static constexpr uint64_t kMost = 0xffffffffu;                    // tasks that a range can number
    static constexpr uint64_t kOpen = 1u << 31, kActive = kOpen - 1;  // bits of state_, below the loop's number

    void run_some(uint64_t first, uint64_t count, uint64_t threads, const std::function<void(uint64_t)>& body) {
        threads = hire(std::min(threads, kMaxThreads) - 1) + 1;
        body_ = &body;
        first_ = first;
        threads_ = threads;
        for (uint64_t t = 0; t < threads; ++t)
            ranges_[t].bounds.store(Range::pack(count * t / threads, count * (t + 1) / threads),
                                    std::memory_order_relaxed);
        const uint64_t loop = (state_.load(std::memory_order_relaxed) >> 32) + 1;
        state_.store(loop << 32 | kOpen, std::memory_order_release);
        loop_.store(static_cast<uint32_t>(loop), std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst) > 0) loop_.notify_all();
        drain(0);
        // Every task has been taken. Nobody may come in any more; wait for those at work.
        state_.fetch_and(~kOpen, std::memory_order_relaxed);
        for (int spins = 0; state_.load(std::memory_order_acquire) & kActive; ++spins)
            if (spins < kSpins)
                relax();
            else
                std::this_thread::yield();  // one of them may be waiting for this core
    }

    void drain(uint64_t self) {
        Range& mine = ranges_[self];
        do {
            for (uint64_t task; mine.take(task);) (*body_)(first_ + task);
        } while (steal(self));
    }
    bool steal(uint64_t self) noexcept {
        for (uint64_t i = 1; i < threads_; ++i)
            if (ranges_[(self + i) % threads_].steal(ranges_[self])) return true;
        return false;
    }

    // Sees to `wanted` workers, or as many as the system grants: fewer threads change the time, never the result.
    uint64_t hire(uint64_t wanted) {
        try {
            // Workers are detached: they hold nothing that outlives the process, and joining at exit could hang a
            // forked child.
            while (workers_ < wanted) {
                std::thread([this, self = workers_ + 1, seen = loop_.load()] { work(self, seen); }).detach();
                ++workers_;
            }
        } catch (const std::system_error&) {}
        return std::min(wanted, workers_);
    }
    [[noreturn]] void work(uint64_t self, uint32_t seen) {
        while (true) {
            for (int i = 0; i < kSpins && loop_.load(std::memory_order_acquire) == seen; ++i) relax();
            if (loop_.load(std::memory_order_acquire) == seen) {
                asleep_.fetch_add(1, std::memory_order_seq_cst);
                loop_.wait(seen, std::memory_order_seq_cst);
                asleep_.fetch_sub(1, std::memory_order_relaxed);
            }
            seen = loop_.load(std::memory_order_acquire);
            if (!enter()) continue;
            // Open, so threads_ and the ranges are this loop's.
            if (self < threads_) drain(self);
            state_.fetch_sub(1, std::memory_order_release);
        }
    }
    bool enter() noexcept {
        uint64_t state = state_.load(std::memory_order_acquire);
        while (state & kOpen)
            if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) return true;
        return false;
    }

    std::mutex turn_;
    const std::function<void(uint64_t)>* body_ = nullptr;
    uint64_t first_ = 0, threads_ = 0, workers_ = 0;
    std::atomic<uint64_t> state_{0};  // number of the loop | open | threads inside
    std::atomic<uint32_t> loop_{0}, asleep_{0};
    std::unique_ptr<Range[]> ranges_ = std::make_unique<Range[]>(kMaxThreads);
};

// Never destroyed: workers may still be asleep in it when the process exits. A forked child has no workers, so it gets
// a new one.
std::atomic<Pool*> g_pool{nullptr};

Pool& pool() {
    static const bool registered = [] {
        g_pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
        return true;
    }();
    static_cast<void>(registered);
    return *g_pool.load();
}

}  // namespace

void parallel_for(uint64_t count, int threads, const std::function<void(uint64_t)>& body) {
    if (count <= 1 || threads <= 1) {
        for (uint64_t i = 0; i < count; ++i) body(i);
        return;
    }
    pool().run(count, threads, body);
}

}  // namespace qmoe
