// Linux only. MLX's CPU wheel links the reference BLAS (about 4 GFLOP/s). Loaded with global symbols before MLX, this
// library provides the one routine that matters, cblas_sgemm, and hands it to an optimised BLAS with 64-bit integers:
// the OpenBLAS inside numpy's wheel. blas.py finds that routine and passes its address.
#include <atomic>
#include <cstdint>

using sgemm64 = void (*)(int, int, int, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t,
                         float, float*, int64_t);

static sgemm64 target = nullptr;
static std::atomic<uint64_t> calls{0};

extern "C" void tq_blas_set_target(void* routine) { target = reinterpret_cast<sgemm64>(routine); }
extern "C" uint64_t tq_blas_calls() { return calls.load(); }

extern "C" void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda,
                            const float* b, int ldb, float beta, float* c, int ldc) {
  calls.fetch_add(1, std::memory_order_relaxed);
  target(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
