// Workers spin for some microseconds after each job, because a layer is a row of short jobs, then sleep.
#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace tqmoe {
namespace {

constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  void (*work)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
  int64_t count = 0;
  std::atomic<int64_t> next{0};
};

class Pool {
 public:
  explicit Pool(int threads) : size_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return size_; }

  void run(int64_t count, void (*work)(void*, int64_t, int), void* context) {
    job_.work = work;
    job_.context = context;
    job_.count = count;
    job_.next.store(0);
    busy_.store(size_ - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);  // a worker that is about to sleep has not missed the job
      generation_.fetch_add(1);
    }
    if (sleepers_.load() > 0) wake_.notify_all();
    take_items(0);
    for (int spins = 0; busy_.load(std::memory_order_acquire) > 0; ++spins) {
      relax();
      if (spins > kSpins) std::this_thread::yield();  // a worker may have lost its core
    }
  }

 private:
  void take_items(int thread) {
    for (int64_t item; (item = job_.next.fetch_add(1, std::memory_order_relaxed)) < job_.count;) {
      job_.work(job_.context, item, thread);
    }
  }

  void serve(int thread) {
    uint64_t seen = 0;
    while (true) {
      for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) relax();
      if (generation_.load() == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
      ++seen;
      if (stop_) return;
      take_items(thread);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int size_;
  Job job_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> busy_{0}, sleepers_{0};
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

void Turn::run(int64_t count, void (*work)(void*, int64_t, int), void* context) {
  if (threads_ > 1 && count > 1) return state()->pool->run(count, work, context);
  for (int64_t item = 0; item < count; ++item) work(context, item, 0);
}

}  // namespace tqmoe
