// The threads of one call of the CPU kernels.
//
// PyTorch's parallel_for ends when each of its threads has come and done its share. A call has a sweep for every
// iteration, so on a busy machine it would wait that often for a thread that is not running. Here parallel_for is
// called once: one thread, the leader, runs the call, and the others take tasks from it. A sweep ends when its tasks
// are done, whoever did them, and a thread that comes late is missed by nobody.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>

#include "cpu/entry_points.h"

namespace fastcaps {

class Team {
 public:
  // Calls work() on this thread. Its calls of `parallel` are shared with PyTorch's other threads, if there are enough
  // products to compute: fewer are done before another thread has come (4 of 50 us for a layer of 2, 10 -> 5, 8 -> 8).
  template <class Work>
  static void run(int64_t products, const Work& work) {
    const int64_t threads = torch::stable::get_num_threads();
    if (threads < 2 || products < kFewProducts) return work();
    Team team;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (begin > 0) return team.help();
      leading = &team;
      try {
        work();
      } catch (...) {  // no exception but PyTorch's own gets out of its threads
        team.failure = std::current_exception();
      }
      leading = nullptr;
      team.ended.store(true, std::memory_order_release);
    });
    if (team.failure) std::rethrow_exception(team.failure);
  }

  // A Parallel: in the threads of this thread's team, if it leads one.
  static void parallel(int64_t n, void* context, Body body) {
    if (n < 2 || !leading) return body(context, 0, n);
    leading->share(n, context, body);
  }

 private:
  // What is left of a job in one word, that a thread changes to take a part: the job's number, and the parts from
  // `front` to `back` that nobody has. The leader takes the first one and the others the last one, so that each meets
  // about the same input capsules in every sweep.
  static constexpr int kBits = 16;
  static constexpr uint64_t kMask = (1 << kBits) - 1;
  static constexpr int64_t kParts = 1024;
  static constexpr int64_t kFewProducts = 1 << 16;
  static uint64_t pack(uint64_t job, uint64_t front, uint64_t back) { return job << 2 * kBits | front << kBits | back; }

  void share(int64_t tasks, void* with, Body what) {
    const int64_t count = std::min(tasks, kParts);
    n.store(tasks, relaxed), parts.store(count, relaxed), context.store(with, relaxed), body.store(what, relaxed);
    done.store(0, relaxed);
    left.store(pack(++job, 0, count), std::memory_order_release);
    while (take(true)) {
    }
    for (int spins = 0; done.load(std::memory_order_acquire) < count;) wait(spins);
    if (task_failure) std::rethrow_exception(task_failure);
  }
  void help() {
    for (int spins = 0; !ended.load(std::memory_order_acquire);)
      if (take(false))
        spins = 0;
      else
        wait(spins);
  }
  bool take(bool leader) {
    uint64_t now = left.load(std::memory_order_acquire);
    while (true) {
      const uint64_t front = now >> kBits & kMask, back = now & kMask;
      if (front >= back) return false;
      // They belong to this job if it is still the same below: the next one starts when nothing of it is left.
      const int64_t tasks = n.load(relaxed), count = parts.load(relaxed);
      void* const with = context.load(relaxed);
      const Body what = body.load(relaxed);
      const uint64_t next = leader ? now + (1 << kBits) : now - 1;
      if (!left.compare_exchange_weak(now, next, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      const int64_t part = leader ? front : back - 1;
      Team* const led = std::exchange(leading, nullptr);  // what a task calls stays on its thread
      try {
        what(with, tasks * part / count, tasks * (part + 1) / count);
      } catch (...) {
        if (!failed.exchange(true)) task_failure = std::current_exception();
      }
      leading = led;
      done.fetch_add(1, std::memory_order_acq_rel);
      return true;
    }
  }
  // For what comes soon, or else for the time that another thread needs.
  static void wait(int& spins) {
    constexpr int kSpins = 2000;
    if (++spins > kSpins) return std::this_thread::yield();
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
  }

  static constexpr auto relaxed = std::memory_order_relaxed;
  static inline thread_local Team* leading = nullptr;
  uint64_t job = 0;
  std::atomic<int64_t> n = 0, parts = 0, done = 0;
  std::atomic<void*> context = nullptr;
  std::atomic<Body> body = nullptr;
  std::atomic<uint64_t> left = 0;
  std::atomic<bool> ended = false, failed = false;
  std::exception_ptr failure, task_failure;
};

}  // namespace fastcaps
