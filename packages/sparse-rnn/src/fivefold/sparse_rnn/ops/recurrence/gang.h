// Threads that go through time together: they start at once, meet after every step, and none waits
// for one that never came.

#pragma once

#include "fivefold.h"

namespace sparse_rnn {

inline void rest() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Where members wait for each other. A member that spins too long gives its CPU away, perhaps to
// the one that is waited for.
class Barrier {
 public:
  // Returns when `members` threads have called it for the `round`-th time, counted from 1.
  void meet(int64_t round, int64_t members) {
    const int64_t all = round * members;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == all - 1) return;
    for (int64_t spins = 0; arrived_.load(std::memory_order_acquire) < all; ++spins) {
      rest();
      if (spins >= kPatience) std::this_thread::yield();
    }
  }

 private:
  static constexpr int64_t kPatience = 4096;  // some tens of microseconds
  alignas(64) std::atomic<int64_t> arrived_{0};
};

// Workers of fivefold.h run parts one after another where threads are scarce, and a part that waits
// for one that has not begun would wait for ever. So members first sign in; after a while the list
// is closed, and those on it share the work.
class Gang {
 public:
  // body(member, members) on up to `wanted` threads at once; `patience` microseconds are worth
  // waiting for one more.
  template <class F>
  static void run(int64_t wanted, int64_t patience, F body) {
    if (wanted <= 1) return body(0, 1);
    struct Job {
      Gang gang;
      F& body;
      int64_t wanted, patience;
    } job{{}, body, wanted, patience};
    const auto part = [](void* pointer, int64_t) {
      Job& job = *static_cast<Job*>(pointer);
      const int64_t member = job.gang.sign_in();
      if (member < 0) return;
      if (member == 0) job.gang.close(job.wanted, job.patience);
      job.body(member, job.gang.wait_for_list());
    };
    fivefold::Workers::run_all(part, &job, wanted);
  }

 private:
  static constexpr int64_t kClosed = int64_t(1) << 32;

  // The member's number, or -1 where the list is closed.
  int64_t sign_in() {
    int64_t seen = list_.load();
    while (!(seen & kClosed))
      if (list_.compare_exchange_weak(seen, seen + 1)) return seen;
    return -1;
  }

  void close(int64_t wanted, int64_t patience) {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point end = Clock::now() + std::chrono::microseconds(patience);
    for (int64_t spins = 1; list_.load() < wanted; ++spins) {
      rest();
      if (spins % 64 == 0) {
        if (Clock::now() > end) break;
        std::this_thread::yield();
      }
    }
    list_.fetch_or(kClosed);
  }

  int64_t wait_for_list() {
    while (!(list_.load() & kClosed)) rest();
    return list_.load() & ~kClosed;
  }

  std::atomic<int64_t> list_{0};
};

}  // namespace sparse_rnn
