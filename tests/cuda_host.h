// A CUDA kernel as C++ for the host: one fiber for each thread of a block, blocks one after the other. The types of half
// and bfloat16 are the CUDA toolkit's own headers, which also work on a host; the rest of what the kernels call is here.
// A simd operation that not all 32 lanes reach, or a barrier that not all threads reach, ends the run with an error.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <ucontext.h>
#include <vector>
#include <vector_functions.h>

#undef __shared__
#define __shared__ static

namespace host {
struct Rendezvous {  // of a warp or a block; `round` counts those that are complete
  unsigned members = 0, arrived = 0, round = 0;
  uint64_t values[2][32];
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool done = false;
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Rendezvous> warps;
inline Rendezvous block;
inline unsigned current, steps;
inline uint3 thread_index, block_index;
inline dim3 block_size;

inline void wait(Rendezvous& at) {
  const unsigned round = at.round;
  if (++at.arrived == at.members) {
    at.arrived = 0;
    ++at.round;
    ++steps;
  }
  while (at.round == round) {
    const unsigned mine = current;
    swapcontext(&fibers[mine].context, &scheduler);
  }
}

// Every lane's value; two sets, as one lane may be a round ahead of another that still reads.
template <typename T>
const uint64_t* gather(T v) {
  Rendezvous& warp = warps[current / 32];
  uint64_t* values = warp.values[warp.round % 2];
  memcpy(&values[current % 32], &v, sizeof v);
  wait(warp);
  return values;
}
template <typename T>
T shuffle(T v, unsigned lane) {
  const uint64_t* values = gather(v);
  T out;
  memcpy(&out, &values[lane % 32], sizeof out);
  return out;
}

// Runs `thread` for each thread of each block of 1-D blocks. Returns false if threads wait for others that never come.
inline bool launch(dim3 grid, dim3 size, void (*thread)()) {
  block_size = size;
  fibers.resize(size.x);
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
    block_index = make_uint3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    warps.assign(size.x / 32, Rendezvous());
    for (Rendezvous& warp : warps) warp.members = 32;
    block = Rendezvous();
    block.members = size.x;
    for (Fiber& f : fibers) {
      f.done = false;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = &scheduler;
      makecontext(&f.context, thread, 0);
    }
    for (unsigned left = size.x; left > 0;) {
      const unsigned before = steps, left_before = left;
      for (current = 0; current < size.x; ++current) {
        if (fibers[current].done) continue;
        thread_index = make_uint3(current, 0, 0);
        swapcontext(&scheduler, &fibers[current].context);
        left -= fibers[current].done;
      }
      if (before == steps && left_before == left) return false;
    }
  }
  return true;
}
}  // namespace host

#define threadIdx host::thread_index
#define blockIdx host::block_index
#define blockDim host::block_size
inline void __syncthreads() { host::wait(host::block); }
inline void __syncwarp() { host::wait(host::warps[host::current / 32]); }
template <typename T>
T __shfl_sync(unsigned, T v, int lane) { return host::shuffle(v, lane); }
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask) { return host::shuffle(v, threadIdx.x ^ mask); }
template <typename T>
T __shfl_up_sync(unsigned, T v, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return host::shuffle(v, lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* votes = host::gather(uint64_t(vote));
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned(votes[i]) << i;
  return bits;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(v); }
template <typename T>
T min(T a, T b) { return b < a ? b : a; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }
