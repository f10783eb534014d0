// Records of the trellis codec: the verdict of tq_check_record, tq_record_shape and tq_dequantize, against a slow
// reading of the format. A record that nobody checked may decode to anything, but only inside its own bytes.
//
// Input: options, asked, matrix, first row (2 bytes), rows; the record.
#include "slow_trellis.h"

namespace {

constexpr int64_t kMostFloats = 1 << 15;

struct Options {
  bool repair, other_isa;
  int shift, asked, matrix;
  int64_t first, rows;
};

Options options_of(Input* in) {
  const uint32_t flags = in->byte();
  Options o{};
  o.repair = flags & 1, o.other_isa = flags & 2;
  o.shift = flags >> 2 & 3;
  o.asked = static_cast<int>(in->byte());
  o.matrix = static_cast<int8_t>(in->byte());
  o.first = in->byte();
  o.first |= in->byte() << 8;
  o.rows = in->number(1, 40);
  return o;
}

// The verdict on a record whose config asks for what its header says, or (asked) for something else.
bool check(const Exact<uint8_t>& record, const std::vector<slow::Matrix>& sound, int asked) {
  const bool bias = record.size() >= 64 && (record[12] & 1);
  const int count = record.size() >= 64 ? std::max(1, std::min(3, int{record[7]})) : 1;
  std::vector<uint32_t> shapes;
  for (int i = 0; i < 2 * count; ++i) {
    shapes.push_back(record.size() >= 64 ? slow::u32(record.get() + 16 + 12 * (i / 2) + 4 * (i % 2)) : 1);
  }
  bool want = !sound.empty();
  if (asked >= 128) {  // one number of what is asked for is another than the record's
    shapes[static_cast<size_t>(asked) % shapes.size()] += 1 + asked % 32;
    want = false;
  }
  const bool other_bias = (asked & 64) != 0;
  const int got = tq_check_record(record.get(), record.size(), shapes.data(), count, bias != other_bias);
  if (got != (want && !other_bias)) wrong("tq_check_record says %d, the format says %d", got, want && !other_bias);
  return got;
}

// What decode gives for rows that are there; a record that is not sound is only decoded.
void dequantize(const Exact<uint8_t>& record, const std::vector<slow::Matrix>& sound, const Options& o,
                int64_t columns) {
  const int64_t wide = (columns + 63) / 64 * 64, rows = std::max<int64_t>(1, std::min(o.rows, kMostFloats / wide));
  std::vector<float> want;
  bool inside = false;
  if (!sound.empty()) {
    const slow::Matrix& m = sound[static_cast<size_t>(o.matrix)];
    inside = o.first + rows <= m.padded_rows;
    if (inside) want = slow::decode(record.get(), m, o.first, o.first + rows);
    compared.count += inside;
  }
  for (const char* name : instruction_sets()) {
    use(name);
    Exact<float> out(rows * wide);
    const int status = tq_dequantize(record.get(), record.size(), o.matrix, o.first, o.first + rows, out.get());
    if (!sound.empty() && status != (inside ? TQ_OK : TQ_SHAPE)) wrong("%s: tq_dequantize gives %d", name, status);
    if (inside && !same_bits(out.get(), want.data(), rows * wide)) wrong("%s: weights differ", name);
    if (sound.empty() && !o.other_isa) return;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  instruction_sets();
  Input in{data, size};
  const Options o = options_of(&in);
  Exact<uint8_t> record = rest_of(in, o.shift);
  if (o.repair) slow::repair(record.get(), record.size());
  const std::vector<slow::Matrix> sound = slow::read(record.get(), record.size());
  check(record, sound, o.asked);
  int64_t shape[3] = {};
  const int status = tq_record_shape(record.get(), record.size(), o.matrix, shape);
  const bool there = o.matrix >= 0 && o.matrix < static_cast<int>(sound.size());
  if (!sound.empty() && status != (there ? TQ_OK : TQ_SHAPE)) wrong("tq_record_shape gives %d", status);
  if (there && (shape[0] != sound[o.matrix].rows || shape[1] != sound[o.matrix].columns)) wrong("another shape");
  if (status == TQ_OK) dequantize(record, sound, o, shape[1]);
  return 0;
}
