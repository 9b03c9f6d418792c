#pragma once

#include <cstdint>

#include "core/ll_args.h"

namespace ep::cpu {

/// The loops of the FP8 formats. All variants give the same bits.
struct Fp8Kernels {
  /// Casts a row: `out` [hidden] e4m3, `scales` [hidden / 128] as fp32 whatever the format.
  void (*cast)(const uint16_t* x, int64_t hidden, bool is_rounded, uint8_t* out, float* scales);

  /// sum[i] += weight * (scale * element), each operation rounded to fp32.
  void (*accumulate)(const uint8_t* row, const float* scales, float weight, int64_t hidden,
                     float* sum);

  /// Rounds to bf16, nearest even, NaN to 0x7fc0.
  void (*round)(const float* sum, int64_t hidden, uint16_t* out);
};

/// The fastest variant that this processor runs.
const Fp8Kernels& select_fp8_kernels();

namespace scalar {
extern const Fp8Kernels kFp8Kernels;
}
namespace avx2 {
extern const Fp8Kernels kFp8Kernels;
}
namespace avx512 {
extern const Fp8Kernels kFp8Kernels;
}

}  // namespace ep::cpu
