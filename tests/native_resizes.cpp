// Pools that come and go between short jobs: nothing of a job may run once it has ended. Prints the number of jobs of
// which something did.
//
//   native_resizes JOBS
#include "threads.h"

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  const int jobs = argc > 1 ? std::atoi(argv[1]) : 0;
  constexpr int kItems = 2, kKept = 16;
  std::array<std::atomic<int>, kKept> hits{};
  long bad = 0;
  for (int job = 0; job < jobs; ++job) {
    auto& own = hits[job % kKept];
    bad += own != (job < kKept ? 0 : kItems);  // what the pools since have made of it
    own = 0;
    tqmoe::set_threads(2 + job % 4);
    tqmoe::Turn().each(kItems, [&own](int64_t, int) { ++own; });
  }
  std::printf("%ld\n", bad);
}
