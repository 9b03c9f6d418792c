#include "cpu/ll_cast.h"

#include "cpu/simd.h"

namespace ep::cpu {

const Fp8Kernels& select_fp8_kernels() {
#if defined(__x86_64__)
  if (simd() == Simd::kAvx512) return avx512::kFp8Kernels;
  if (simd() == Simd::kAvx2) return avx2::kFp8Kernels;
#endif
  return scalar::kFp8Kernels;
}

}  // namespace ep::cpu
