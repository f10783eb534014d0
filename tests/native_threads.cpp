// Every item of every job must run exactly once, whatever the workers are late for. Prints the number of bad jobs.
#include "threads.h"

#include <atomic>
#include <cstdio>
#include <vector>

int main() {
  tqmoe::set_threads(8);
  constexpr int kJobs = 400000, kMost = 64;
  std::vector<std::atomic<int>> hits(kMost);
  long bad = 0;
  for (int job = 0; job < kJobs; ++job) {
    const int count = 2 + job * 7 % 60;
    for (int i = 0; i < count; ++i) hits[i] = 0;
    tqmoe::Turn().each(count, [&](int64_t item, int) { hits[item]++; });
    for (int i = 0; i < count; ++i) {
      if (hits[i] != 1) {
        ++bad;
        break;
      }
    }
  }
  std::printf("%ld\n", bad);
}
