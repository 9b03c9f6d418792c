#include "cpu/simd.h"

#include <cstdlib>
#include <cstring>

#include "core/check.h"

namespace ep::cpu {
namespace {

Simd detect_simd() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const Simd best = has_avx512 ? Simd::kAvx512 : has_avx2 ? Simd::kAvx2 : Simd::kScalar;
#else
  const Simd best = Simd::kScalar;
#endif
  const char* wish = std::getenv("EP_KERNELS_SIMD");
  if (wish == nullptr || *wish == '\0') return best;
  Simd wanted = best;
  if (std::strcmp(wish, "scalar") == 0) {
    wanted = Simd::kScalar;
  } else if (std::strcmp(wish, "avx2") == 0) {
    wanted = Simd::kAvx2;
  } else {
    EP_CHECK(std::strcmp(wish, "avx512") == 0, "EP_KERNELS_SIMD=", wish,
             " is unknown; use scalar, avx2 or avx512");
  }
  return wanted < best ? wanted : best;
}

}  // namespace

Simd simd() {
  static const Simd value = detect_simd();
  return value;
}

}  // namespace ep::cpu
