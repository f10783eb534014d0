// A reader pool and products as the Python package runs them, on the C++ library alone, for ThreadSanitizer: readers
// copy records into slots and check them, products multiply from pinned slots, while others encode, ask with wrong
// arguments, and change the number of threads. Every result is compared with the one of a single thread.
//
//   native_races RECORDS SECONDS
//
// RECORDS is what tests/abuse/races.py writes: i64 count, size, hidden, middle; the two signs, float32; the records.
// Prints counts as JSON; exit status 1 if a result was wrong.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "tiny_qmoe_cpu.h"

namespace {

constexpr int kSlots = 6, kReaders = 4, kProducts = 5, kTokens = 3, kPicked = 2;
std::atomic<long> products{0}, reads{0}, encodings{0}, refusals{0}, wrong{0};
std::atomic<bool> stop{false};

struct Model {
  int64_t count, size, hidden, middle;
  std::vector<float> sign_in, sign_mid, x, want;  // x [kTokens][hidden], want [count][kTokens][hidden]
  std::vector<uint8_t> records;
};

Model load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  Model m;
  auto get = [&](void* to, size_t bytes) { file.read(static_cast<char*>(to), static_cast<std::streamsize>(bytes)); };
  get(&m.count, 4 * sizeof(int64_t));
  m.sign_in.resize((m.hidden + 63) / 64 * 64);
  m.sign_mid.resize((m.middle + 63) / 64 * 64);
  get(m.sign_in.data(), 4 * m.sign_in.size());
  get(m.sign_mid.data(), 4 * m.sign_mid.size());
  m.records.resize(m.count * m.size);
  get(m.records.data(), m.records.size());
  if (!file) std::exit(2);
  std::mt19937 draw(1);
  std::normal_distribution<float> normal;
  m.x.resize(kTokens * m.hidden);
  for (float& v : m.x) v = normal(draw);
  return m;
}

int multiply(const Model& m, const uint8_t* pool, uint64_t bytes, const std::vector<int64_t>& offsets, float* y) {
  std::vector<int64_t> of;
  std::vector<int32_t> rows;
  for (int64_t offset : offsets) {
    for (int t = 0; t < kTokens; ++t) {
      of.push_back(offset);
      rows.push_back(t);
    }
  }
  return tq_gather_moe(pool, bytes, of.data(), static_cast<int64_t>(of.size()), m.x.data(), kTokens, m.hidden,
                       m.middle, m.hidden, rows.data(), m.sign_in.data(), m.sign_mid.data(), TQ_SILU, 1.702f, 7.0f, y);
}

// As streaming/cache.py: one lock for all that is known of slots, nobody holds it at work.
struct Cache {
  explicit Cache(const Model& model) : m(model), pool(kSlots * model.size), of(kSlots, -1), pins(kSlots, 0) {}

  void read() {  // a reader's thread
    while (true) {
      int slot;
      {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return !queue.empty() || stop; });
        if (stop) return;
        slot = queue.back();
        queue.pop_back();
      }
      uint8_t* to = pool.data() + slot * m.size;
      std::memcpy(to, m.records.data() + of_slot(slot) * m.size, static_cast<size_t>(m.size));
      const uint32_t shapes[6] = {static_cast<uint32_t>(m.middle), static_cast<uint32_t>(m.hidden),
                                  static_cast<uint32_t>(m.middle), static_cast<uint32_t>(m.hidden),
                                  static_cast<uint32_t>(m.hidden), static_cast<uint32_t>(m.middle)};
      wrong += tq_check_record(to, static_cast<uint64_t>(m.size), shapes, 3, 0) != 1;
      ++reads;
      std::lock_guard<std::mutex> lock(mutex);
      ready[of[slot]] = slot;
      changed.notify_all();
    }
  }

  int64_t of_slot(int slot) {
    std::lock_guard<std::mutex> lock(mutex);
    return of[slot];
  }

  // Waits for an expert and pins it; its slot, or -1 at the end.
  int demand(int64_t expert) {
    std::unique_lock<std::mutex> lock(mutex);
    while (!stop) {
      auto found = ready.find(expert);
      if (found != ready.end()) {
        ++pins[found->second];
        return found->second;
      }
      bool asked = false;
      for (int slot = 0; slot < kSlots; ++slot) asked |= of[slot] == expert;
      if (!asked) ask(expert);
      changed.wait_for(lock, std::chrono::milliseconds(50));
    }
    return -1;
  }

  void ask(int64_t expert) {
    for (int slot = 0; slot < kSlots; ++slot) {
      const bool loading = of[slot] >= 0 && !ready.count(of[slot]);
      if (pins[slot] || loading) continue;
      ready.erase(of[slot]);
      of[slot] = expert;
      queue.push_back(slot);
      changed.notify_all();
      return;
    }
  }

  void release(int slot) {
    std::lock_guard<std::mutex> lock(mutex);
    --pins[slot];
    changed.notify_all();
  }

  const Model& m;
  std::vector<uint8_t> pool;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<int64_t> of;  // expert in each slot, or on its way there
  std::vector<int> pins, queue;
  std::map<int64_t, int> ready;
};

void product(Cache& cache, int seed) {
  const Model& m = cache.m;
  std::mt19937 draw(static_cast<unsigned>(seed));
  std::vector<float> y(kPicked * kTokens * m.hidden);
  while (!stop) {
    std::vector<int64_t> experts, offsets;
    std::vector<int> slots;
    while (static_cast<int>(experts.size()) < (seed == 0 ? 1 : kPicked)) {
      const int64_t expert = static_cast<int64_t>(draw() % m.count);
      if (!experts.empty() && experts[0] >= expert) continue;  // ascending: two that wait for each other cannot be
      const int slot = cache.demand(expert);
      if (slot < 0) break;
      experts.push_back(expert);
      slots.push_back(slot);
      offsets.push_back(slot * m.size);
      if (expert == m.count - 1) break;
    }
    if (!experts.empty() && multiply(m, cache.pool.data(), cache.pool.size(), offsets, y.data()) != TQ_OK) ++wrong;
    for (size_t i = 0; i < experts.size(); ++i) {
      const int64_t floats = kTokens * m.hidden;
      wrong += std::memcmp(&y[i * floats], &m.want[experts[i] * floats], 4 * floats) != 0;
      cache.release(slots[i]);
      ++products;
    }
  }
}

void encode(const Model& m) {
  std::vector<uint8_t> codes(32 * 4), want(codes.size());
  std::vector<float> values(512);
  (void)m;
  std::vector<float> x(512);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3.0f;
  wrong += tq_encode_tiles(x.data(), 1, 2, 12, want.data(), values.data()) != TQ_OK;
  while (!stop) {
    wrong += tq_encode_tiles(x.data(), 1, 2, 12, codes.data(), values.data()) != TQ_OK || codes != want;
    ++encodings;
  }
}

void ask_wrongly(const Model& m) {
  std::vector<uint8_t> broken(m.records.begin(), m.records.begin() + m.size);
  broken[0] ^= 1;
  std::vector<float> y(kTokens * m.hidden);
  while (!stop) {
    wrong += multiply(m, m.records.data(), m.records.size(), {m.count * m.size}, y.data()) != TQ_RANGE;
    wrong += multiply(m, broken.data(), broken.size(), {0}, y.data()) != TQ_RECORD;
    refusals += 2;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  Model m = load(argv[1]);
  tq_set_threads(1);
  m.want.resize(m.count * kTokens * m.hidden);
  for (int64_t e = 0; e < m.count; ++e) {
    if (multiply(m, m.records.data(), m.records.size(), {e * m.size}, &m.want[e * kTokens * m.hidden])) return 2;
  }
  Cache cache(m);
  std::vector<std::thread> threads;
  for (int i = 0; i < kReaders; ++i) threads.emplace_back([&] { cache.read(); });
  for (int i = 0; i < kProducts; ++i) threads.emplace_back([&, i] { product(cache, i); });
  threads.emplace_back([&] { encode(m); });
  threads.emplace_back([&] { ask_wrongly(m); });
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[2]));
  for (int i = 0; std::chrono::steady_clock::now() < end; ++i) {
    tq_set_threads(1 + i % 5);
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
  {
    std::lock_guard<std::mutex> lock(cache.mutex);
    stop = true;
  }
  cache.changed.notify_all();
  for (auto& thread : threads) thread.join();
  std::printf("{\"products\": %ld, \"reads\": %ld, \"encodings\": %ld, \"refusals\": %ld, \"wrong\": %ld}\n",
              products.load(), reads.load(), encodings.load(), refusals.load(), wrong.load());
  return wrong != 0;
}
