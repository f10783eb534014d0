// Rows of an MLX affine matrix (groups of 64 columns, 4 or 8 bits) times up to 8 tokens. Included by each instruction-set
// file after decode_impl.h.
//
// A row's product is the sum over groups of scale * (q . x) + bias * sum(x). Each group of x comes in the order in which whole
// vectors of weights are had: at 4 bits a byte holds two columns, and the even columns come before the odd ones; at 8 bits a
// word holds four, and columns 0, 4, 8, ... come first, then 1, 5, 9, ...
namespace {

constexpr int kAffineGroup = 64;

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

inline F widen(Bytes b) { return __builtin_convertvector(__builtin_convertvector(b, I), F); }
inline Bytes load_bytes(const uint8_t* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline float lane_sum(F v) {
  float s = 0.0f;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

// The 64 weights of a group as floats, in x's order.
template <int Bits>
TQMOE_INLINE void group_weights(const uint8_t* p, F* w) {
  constexpr int vectors = kAffineGroup / kLanes;
  if constexpr (Bits == 8) {
    // By words: gcc 12 converts a vector of bytes that it has just loaded one by one.
    constexpr int words = vectors / 4;
    for (int i = 0; i < words; ++i) {
      U v = load_words(p + 4 * kLanes * i);
      for (int k = 0; k < 4; ++k) w[words * k + i] = __builtin_convertvector((I)(v >> (8 * k) & 255), F);
    }
  } else {
    for (int i = 0; i < vectors / 2; ++i) {
      Bytes b = load_bytes(p + kLanes * i);
      w[i] = widen(b & 15);
      w[i + vectors / 2] = widen(b >> 4);
    }
  }
}

template <int Bits, int Tokens>
void affine_rows_of(const AffineJob& job, int64_t first, int64_t last) {
  constexpr int vectors = kAffineGroup / kLanes;
  const int64_t groups = job.columns / kAffineGroup;
  for (int64_t row = first; row < last; ++row) {
    const uint8_t* q = job.weights + row * groups * (kAffineGroup * Bits / 8);
    const float *scale = job.scales + row * groups, *bias = job.biases + row * groups;
    F sum[Tokens] = {};
    float offset[Tokens] = {};
    for (int64_t g = 0; g < groups; ++g, q += kAffineGroup * Bits / 8) {
      F w[vectors];
      group_weights<Bits>(q, w);
      for (int t = 0; t < Tokens; ++t) {
        const float* x = job.x + t * job.columns + g * kAffineGroup;
        F even = w[0] * load_floats(x), odd = w[1] * load_floats(x + kLanes);
        for (int i = 2; i < vectors; i += 2) {
          even += w[i] * load_floats(x + kLanes * i);
          odd += w[i + 1] * load_floats(x + kLanes * (i + 1));
        }
        sum[t] += scale[g] * (even + odd);
        offset[t] += bias[g] * job.x_sums[t * groups + g];
      }
    }
    for (int t = 0; t < Tokens; ++t) job.y[t * job.rows + row] = lane_sum(sum[t]) + offset[t];
  }
}

template <int Bits>
void affine_rows_bits(const AffineJob& job, int64_t first, int64_t last) {
  switch (job.tokens) {
    case 1: return affine_rows_of<Bits, 1>(job, first, last);
    case 2: return affine_rows_of<Bits, 2>(job, first, last);
    case 3: return affine_rows_of<Bits, 3>(job, first, last);
    case 4: return affine_rows_of<Bits, 4>(job, first, last);
    case 5: return affine_rows_of<Bits, 5>(job, first, last);
    case 6: return affine_rows_of<Bits, 6>(job, first, last);
    case 7: return affine_rows_of<Bits, 7>(job, first, last);
    default: return affine_rows_of<Bits, 8>(job, first, last);
  }
}

void affine_rows(const AffineJob& job, int64_t first, int64_t last) {
  return job.bits == 8 ? affine_rows_bits<8>(job, first, last) : affine_rows_bits<4>(job, first, last);
}

}  // namespace
