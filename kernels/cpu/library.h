// What the library's own files share; the instruction-set files do not include it (they must not emit common inline code).
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "record.h"
#include "threads.h"
#include "tiny_qmoe_cpu.h"

namespace tqmoe {

const Kernels& active_kernels();

void encode_tiles(const float* x, int64_t tiles, int rate, int length, uint8_t* codes, float* values);

}  // namespace tqmoe
