// One pool of threads for the whole library.
#pragma once
#include <cstdint>
#include <type_traits>

namespace tqmoe {

int threads();
void set_threads(int count);  // at least 1; the caller's own thread is one of them

// One caller's use of the pool. Callers from several threads take turns, and the number of threads stays as it is
// meanwhile.
class Turn {
 public:
  Turn();
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  int threads() const { return threads_; }

  // Calls work(item, thread) for each item from 0 to count - 1, thread from 0 to threads() - 1, and returns when all
  // are done. Work must not throw.
  template <class Work>
  void each(int64_t count, Work&& work) {
    using Type = std::remove_reference_t<Work>;
    run(
        count, [](void* context, int64_t item, int thread) { (*static_cast<Type*>(context))(item, thread); },
        const_cast<void*>(static_cast<const void*>(&work)));
  }

 private:
  void run(int64_t count, void (*work)(void* context, int64_t item, int thread), void* context);
  int threads_;
};

}  // namespace tqmoe
