#pragma once

#include <algorithm>

#include "core/fp8.h"
#include "cpu/ll_cast.h"

// The loops of cpu/ll_cast.h, for the compiler to vectorise: each instruction set includes them in
// a file of its own. In an unnamed namespace, because the linker must not replace one copy by
// another.

namespace ep::cpu {
namespace {

int16_t largest_magnitude(const uint16_t* x) {
  int16_t largest = 0;
  for (int i = 0; i < kScaleGroup; ++i) largest = std::max(largest, bf16_magnitude(x[i]));
  return largest;
}

void cast_row(const uint16_t* x, int64_t hidden, bool is_rounded, uint8_t* out, float* scales) {
  for (int64_t group = 0; group < hidden / kScaleGroup; ++group) {
    const uint16_t* from = x + group * kScaleGroup;
    uint8_t* to = out + group * kScaleGroup;
    const Fp8Scale scale = make_fp8_scale(largest_magnitude(from), is_rounded);
    scales[group] = scale.scale;
    for (int i = 0; i < kScaleGroup; ++i)
      to[i] = float_to_e4m3(bf16_to_float(from[i]) * scale.inverse);
  }
}

void accumulate_row(const uint8_t* row, const float* scales, float weight, int64_t hidden,
                    float* sum) {
  for (int64_t group = 0; group < hidden / kScaleGroup; ++group) {
    const uint8_t* from = row + group * kScaleGroup;
    float* to = sum + group * kScaleGroup;
    const float scale = scales[group];
    for (int i = 0; i < kScaleGroup; ++i) to[i] += weight * (scale * e4m3_to_float(from[i]));
  }
}

void round_row(const float* sum, int64_t hidden, uint16_t* out) {
  for (int64_t i = 0; i < hidden; ++i) out[i] = float_to_bf16(sum[i]);
}

}  // namespace
}  // namespace ep::cpu
