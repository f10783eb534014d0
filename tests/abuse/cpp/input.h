// What the fuzz targets share: the input's options and bytes, buffers that end where unreadable memory begins, and how
// a target says that the library was wrong.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "tiny_qmoe_cpu.h"

#ifndef THREADS
#define THREADS 1  // Turn needs no pool then, so that an execution makes no threads
#endif

// The library did what it must not: the input is kept.
__attribute__((noreturn, format(printf, 1, 2))) inline void wrong(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::abort();
}

// How many executions came as far as a comparison with the slow reading; said at the end.
struct Compared {
  long long count = 0;
  ~Compared() { std::fprintf(stderr, "compared: %lld\n", count); }
};
inline Compared compared;

// The first bytes of an input choose function and shapes, the rest is what a file would hold. Past the end all is 0.
struct Input {
  const uint8_t* data;
  size_t size;

  uint32_t byte() {
    if (size == 0) return 0;
    --size;
    return *data++;
  }
  uint32_t word() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) value |= byte() << (8 * i);
    return value;
  }
  // A number from low to high.
  int64_t number(int64_t low, int64_t high) { return low + byte() % (high - low + 1); }
};

// `count` elements that begin `shift` bytes after an aligned address, with nothing behind the last: the address
// sanitizer sees one byte too far. The contents are poison until they are written.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t count, int shift = 0) : count_(count), shift_(shift) {
    memory_.reset(new uint8_t[static_cast<size_t>(count) * sizeof(T) + shift]);
    std::memset(memory_.get(), 0xCD, static_cast<size_t>(count) * sizeof(T) + shift);
  }
  T* get() { return reinterpret_cast<T*>(memory_.get() + shift_); }
  const T* get() const { return reinterpret_cast<const T*>(memory_.get() + shift_); }
  T& operator[](int64_t i) { return get()[i]; }
  const T& operator[](int64_t i) const { return get()[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  int shift_;
  std::unique_ptr<uint8_t[]> memory_;
};

// All that is left of the input.
inline Exact<uint8_t> rest_of(const Input& in, int shift) {
  Exact<uint8_t> out(static_cast<int64_t>(in.size), shift);
  if (in.size) std::memcpy(out.get(), in.data, in.size);
  return out;
}

template <class T>
Exact<T> exact(const std::vector<T>& values) {
  Exact<T> out(static_cast<int64_t>(values.size()));
  if (!values.empty()) std::memcpy(out.get(), values.data(), values.size() * sizeof(T));
  return out;
}

// Numbers as they lie in a file, at any address.
template <class T>
Exact<uint8_t> bytes_of(const std::vector<T>& values, int shift) {
  Exact<uint8_t> out(static_cast<int64_t>(values.size() * sizeof(T)), shift);
  if (!values.empty()) std::memcpy(out.get(), values.data(), values.size() * sizeof(T));
  return out;
}

inline const std::vector<const char*>& instruction_sets() {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> found;
    while (const char* name = tq_isa_name(static_cast<int>(found.size()))) found.push_back(name);
    tq_set_threads(THREADS);
    return found;
  }();
  return names;
}

inline void use(const char* name) {
  if (tq_use_isa(name)) wrong("%s is a name that tq_isa_name gave, and tq_use_isa refuses it", name);
}

// Floats whose sums round a little, of both signs; with `hostile` now and then one that is none of the kind.
inline float number_of(uint32_t seed, bool hostile) {
  static const uint32_t strange[] = {0x7F800000u, 0xFF800000u, 0x7FC00000u, 0x7F7FFFFFu, 1u, 0x80000000u, 0x00400000u};
  seed = (seed ^ seed >> 15) * 0x2C1B3C6Du;
  seed = (seed ^ seed >> 12) * 0x297A2D39u;
  if (hostile && seed % 8 == 0) {
    float value;
    std::memcpy(&value, &strange[seed / 8 % 7], sizeof value);
    return value;
  }
  return (static_cast<float>(seed >> 20) - 2047.5f) / 1024.0f;
}

// A sum that was made in another order, of terms whose sizes sum to `reach`: float32 rounds each of some thousand steps
// by 2^-24 at most, and a sum's roundings cancel.
inline void expect_near(const char* what, int64_t at, float got, double want, double reach) {
  if (reach > 1e30) return;  // on the way beyond what float32 holds
  if (!(std::fabs(got - want) <= 2e-6 * reach + 1e-30)) {
    wrong("%s %lld: %.9g for %.17g, terms of size %.9g in all", what, static_cast<long long>(at), got, want, reach);
  }
}

inline bool same_bits(const float* a, const float* b, int64_t count) {
  return std::memcmp(a, b, sizeof(float) * static_cast<size_t>(count)) == 0;
}
