// Workers spin for some microseconds after each job, because a layer is a row of short jobs, then sleep.
#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

namespace tqmoe {
namespace {

constexpr int kSpins = 2000;  // some tens of microseconds

using Work = void (*)(void* context, int64_t item, int thread);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The calling thread and some workers share the items of one job at a time. The caller waits for items, not for
// workers: one that sleeps or has lost its core holds nobody up. A worker that comes late must not mix up two jobs, so
// the number of the job and of its next item are one atomic word, and an item is taken by exchanging that word: if it
// was still the same, the fields that were read before belong to this job, which cannot end before the item is done.
class Pool {
 public:
  explicit Pool(int threads) : size_(threads) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
    } catch (...) {  // the system has no more threads: those that have started must not outlive their vector
      stop();
      throw;
    }
  }

  ~Pool() { stop(); }

  int size() const { return size_; }

  void run(uint32_t count, Work work, void* context) {
    // Closed while the fields change: a late worker that has read the old word and the new fields must not get an item.
    ticket_.store(((ticket_.load() >> 32) + 1) << 32 | UINT32_MAX);
    work_ = work;
    context_ = context;
    count_ = count;
    done_ = 0;
    publish();
    take_items(static_cast<uint32_t>(ticket_.load() >> 32), 0);
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) {
      relax();
      if (spins > kSpins) std::this_thread::yield();  // the worker may have lost its core
    }
  }

 private:
  void stop() {
    stop_ = true;
    publish();
    for (auto& worker : workers_) worker.join();
  }

  // A new job, from its item 0.
  void publish() {
    {
      std::lock_guard<std::mutex> lock(mutex_);  // a worker that is about to sleep has not missed it
      ticket_.store(((ticket_.load() >> 32) + 1) << 32);
    }
    if (sleepers_.load() > 0) wake_.notify_all();
  }

  void take_items(uint32_t job, int thread) {
    uint64_t ticket = ticket_.load();
    while (ticket >> 32 == job) {
      const Work work = work_.load();
      void* context = context_.load();
      const uint32_t item = static_cast<uint32_t>(ticket);
      if (item >= count_.load()) return;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
      work(context, item, thread);
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load();
    }
  }

  void serve(int thread) {
    uint32_t seen = 0;
    auto current = [this] { return static_cast<uint32_t>(ticket_.load() >> 32); };
    while (true) {
      for (int spins = 0; current() == seen && spins < kSpins; ++spins) relax();
      if (current() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return current() != seen; });
        sleepers_.fetch_sub(1);
      }
      seen = current();  // before the look at stop_: the end of the pool is no job, and no other comes after it
      if (stop_) return;
      take_items(seen, thread);
    }
  }

  const int size_;
  std::atomic<Work> work_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> count_{0}, done_{0};
  std::atomic<uint64_t> ticket_{0};  // job << 32 | next item
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

// Never destroyed: at exit the workers may still be spinning while static objects go away.
struct State {
  std::mutex turn;
  Pool* pool = nullptr;
  std::atomic<int> wanted{0};
};

State* state() {
  static State* const instance = [] {
    // A forked child has none of the workers and perhaps a locked mutex: it starts anew.
    pthread_atfork(nullptr, nullptr, [] {
      State* old = state();
      int wanted = old->wanted.load();
      new (old) State();
      old->wanted.store(wanted);
    });
    return new State();
  }();
  return instance;
}

}  // namespace

int threads() {
  int wanted = state()->wanted.load();
  if (wanted > 0) return wanted;
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void set_threads(int count) { state()->wanted.store(std::max(1, count)); }

Turn::Turn() : threads_(tqmoe::threads()) {
  if (threads_ == 1) return;  // needs no pool: such callers run side by side
  State* s = state();
  s->turn.lock();
  try {
    if (!s->pool || s->pool->size() != threads_) {
      delete s->pool;
      s->pool = nullptr;
      s->pool = new Pool(threads_);
    }
  } catch (...) {
    s->turn.unlock();
    throw;
  }
}

Turn::~Turn() {
  if (threads_ > 1) state()->turn.unlock();
}

void Turn::run(int64_t count, Work work, void* context) {
  if (threads_ > 1 && count > 1) {
    if (count > UINT32_MAX) throw std::length_error("items");
    return state()->pool->run(static_cast<uint32_t>(count), work, context);
  }
  for (int64_t item = 0; item < count; ++item) work(context, item, 0);
}

}  // namespace tqmoe
