#include "cpu/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace qmoe {
namespace {

class Pool {
  public:
    void run(uint64_t count, int threads, const std::function<void(uint64_t)>& body) {
        const std::lock_guard turn(turn_);
        {
            const std::lock_guard lock(mutex_);
            const uint64_t helpers = hire(std::min<uint64_t>(count - 1, static_cast<uint64_t>(threads) - 1));
            body_ = &body;
            count_ = count;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = helpers;
            running_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        drain(body, count);
        std::unique_lock lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
    }

  private:
    // Sees to `wanted` workers, or as many as the system grants: fewer threads change the time, never the result.
    uint64_t hire(uint64_t wanted) {
        try {
            // Workers are detached: they hold nothing that outlives the process, and joining at exit could hang a
            // forked child.
            while (workers_ < wanted) {
                std::thread([this, index = workers_] { work(index); }).detach();
                ++workers_;
            }
        } catch (const std::system_error&) {}
        return std::min(wanted, workers_);
    }
    void drain(const std::function<void(uint64_t)>& body, uint64_t count) {
        for (uint64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
    }
    [[noreturn]] void work(uint64_t index) {
        uint64_t seen = 0;
        std::unique_lock lock(mutex_);
        while (true) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= wanted_) continue;
            const auto* body = body_;
            const uint64_t count = count_;
            lock.unlock();
            drain(*body, count);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(uint64_t)>* body_ = nullptr;
    uint64_t count_ = 0, workers_ = 0, wanted_ = 0, running_ = 0, generation_ = 0;
    std::atomic<uint64_t> next_{0};
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
