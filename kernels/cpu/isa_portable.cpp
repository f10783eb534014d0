// Any machine: 128-bit vectors of the compiler's vector extension.
#include <utility>

#include "isa.h"
#include "ops16_portable.h"
#include "encode_impl.h"

namespace {
constexpr int kLanes = 4;
}
#include "decode_impl.h"
#include "affine_impl.h"

namespace tqmoe {
const Kernels* portable_kernels() {
  static const Kernels kernels = {"portable", encode_tile_at, multiply_tile_any, decode_tile, rotate, affine_rows};
  return &kernels;
}
}  // namespace tqmoe
