// The part of Metal's standard library that compute kernels use, as C++17 for clang 17 or newer on x86-64.
// With MTL_ADDRESS_SPACES defined, device, constant and threadgroup are clang address spaces and nothing can run (mode
// "as"); without it they vanish and the code runs on the runtime in ../runtime.
#pragma once
#include "abi.h"
#include <type_traits>
#include "types.h"
#include "functions.h"
#include "simd.h"
#include "matrix.h"
#include "atomics.h"
#include "spaces.h"  // last: its macros take over the names device, thread, float4, ...
