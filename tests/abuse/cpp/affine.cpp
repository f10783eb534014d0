// tq_affine_qmv, whose bytes are codes, scales and biases: every code is sound, so what can be wrong is a product or a
// read outside. Floats may be hostile: Inf, NaN, subnormals.
//
// Input: options, rows, groups and tokens, a seed; weights, scales, biases, as far as the bytes reach, then from the
// seed.
#include "input.h"

namespace {

struct Case {
  int bits, tokens;
  int64_t rows, groups;
  Exact<uint8_t> weights;
  Exact<float> scales, biases, x;
};

Exact<float> floats(Input* in, int64_t count, uint32_t seed, bool hostile, bool from_bytes) {
  Exact<float> out(count);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = from_bytes && in->size >= 4 ? in->word() : 0;
    out[i] = number_of(seed * 4096 + static_cast<uint32_t>(i), hostile);
    if (bits) std::memcpy(out.get() + i, &bits, sizeof bits);
  }
  return out;
}

// Every product in float64, and the sizes of its terms, infinite where codes times x, which the library sums before it
// takes the scale, leave what float32 holds: [tokens][rows].
struct Products {
  std::vector<double> y, reach;
};

Products multiply(const Case& k) {
  const int64_t columns = 64 * k.groups;
  Products out{std::vector<double>(static_cast<size_t>(k.tokens * k.rows)), {}};
  out.reach = out.y;
  for (int64_t r = 0; r < k.rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t at = r * columns + c;
      const int code = k.bits == 8 ? k.weights[at] : k.weights[at / 2] >> 4 * (at % 2) & 15;
      const double scaled = code * static_cast<double>(k.scales[at / 64]), bias = k.biases[at / 64];
      for (int t = 0; t < k.tokens; ++t) {
        const double x = k.x[t * columns + c];
        out.y[t * k.rows + r] += (scaled + bias) * x;
        const double size = (std::fabs(scaled) + std::fabs(bias)) * std::fabs(x);
        out.reach[t * k.rows + r] += std::fabs(x) > 1e30 ? INFINITY : size;
      }
    }
  }
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in{data, size};
  const uint32_t flags = in.byte();
  const int64_t rows = in.number(1, 36);
  const uint32_t mixed = in.byte(), seed = in.byte();
  const int bits = flags & 1 ? 8 : 4, tokens = 1 + static_cast<int>(mixed % 8);
  const int64_t groups = 1 + mixed / 8 % 2, bytes = rows * groups * 8 * bits;
  const bool hostile = flags & 2, from_bytes = flags & 4;
  Case k{bits,
         tokens,
         rows,
         groups,
         Exact<uint8_t>(bytes, static_cast<int>(flags >> 3 & 3)),
         floats(&in, rows * groups, seed, hostile, from_bytes),
         floats(&in, rows * groups, seed + 1, hostile, from_bytes),
         floats(&in, 64 * groups * tokens, seed + 2, hostile, false)};
  for (int64_t i = 0; i < bytes; ++i) k.weights[i] = static_cast<uint8_t>(in.size ? in.byte() : i * seed >> 3);
  const Products want = multiply(k);
  for (const char* name : instruction_sets()) {
    use(name);
    Exact<float> y(tokens * rows);
    if (tq_affine_qmv(reinterpret_cast<const uint32_t*>(k.weights.get()), k.scales.get(), k.biases.get(), bits, rows,
                      64 * groups, k.x.get(), tokens, y.get())) {
      wrong("%s: tq_affine_qmv refuses a matrix", name);
    }
    for (int64_t i = 0; i < y.size(); ++i) {
      if (std::isfinite(want.reach[i])) expect_near(name, i, y[i], want.y[i], want.reach[i]);
    }
    ++compared.count;
  }
  return 0;
}
