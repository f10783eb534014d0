// Dense layers of a few tokens: MLX's own affine format, multiplied over the thread pool.
#include <algorithm>
#include <vector>

#include "library.h"

namespace tqmoe {
namespace {

constexpr int64_t kGroup = 64, kRowsAtOnce = 32;

// x with the columns of each group in the order of affine_impl.h, and each group's sum.
void arrange(const float* x, int bits, int64_t columns, float* out, float* sums) {
  const int64_t together = bits == 8 ? 4 : 2;
  for (int64_t g = 0; g < columns / kGroup; ++g, x += kGroup, out += kGroup) {
    float sum = 0.0f;
    for (int64_t i = 0; i < kGroup; ++i) {
      sum += x[i];
      out[i / together + i % together * (kGroup / together)] = x[i];
    }
    sums[g] = sum;
  }
}

}  // namespace

void affine_product(AffineJob job) {
  const int64_t groups = job.columns / kGroup;
  std::vector<float> x(static_cast<size_t>(job.tokens * job.columns)), sums(static_cast<size_t>(job.tokens * groups));
  for (int t = 0; t < job.tokens; ++t) arrange(job.x + t * job.columns, job.bits, job.columns, &x[t * job.columns], &sums[t * groups]);
  job.x = x.data();
  job.x_sums = sums.data();
  Turn turn;
  turn.each((job.rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t part, int) {
    active_kernels().affine_rows(job, part * kRowsAtOnce, std::min(job.rows, (part + 1) * kRowsAtOnce));
  });
}

}  // namespace tqmoe
