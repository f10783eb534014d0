// tq_encode_tiles on floats of any kind: the same codes from every instruction set, and values that are what a slow
// reading of these codes gives.
//
// Input: options, rate, seed; floats, as far as the bytes reach, then from the seed.
#include "slow_trellis.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::vector<const char*>& names = instruction_sets();
  Input in{data, size};
  const uint32_t flags = in.byte();
  const int rate = static_cast<int>(in.number(1, 7)), length = (flags & 15) == 1 ? 16 : (flags & 15) == 2 ? 14 : 12;
  const uint32_t seed = in.byte();
  Exact<float> x(512);
  for (int64_t i = 0; i < x.size(); ++i) {
    const uint32_t bits = in.size >= 4 ? in.word() : 0;
    x[i] = number_of(seed * 4096 + static_cast<uint32_t>(i), flags & 16);
    if (bits) std::memcpy(x.get() + i, &bits, sizeof bits);
  }
  const int planes = slow::kPlanesOf[rate];
  std::vector<uint8_t> first;
  for (const char* name : names) {
    use(name);
    Exact<uint8_t> codes(32 * planes);
    Exact<float> values(512);
    if (tq_encode_tiles(x.get(), 1, rate, length, codes.get(), values.get())) wrong("%s refuses a tile", name);
    const std::vector<uint8_t> bits(codes.get(), codes.get() + codes.size());
    if (!first.empty() && bits != first) wrong("%s gives other codes than %s", name, names[0]);
    first = bits;
    for (int row = 0; row < 32; ++row) {
      float want[16];
      slow::tile_row(bits, rate, length, row, want);
      if (!same_bits(values.get() + 16 * row, want, 16)) wrong("%s: values of row %d are not the codes'", name, row);
    }
    ++compared.count;
  }
  return 0;
}
