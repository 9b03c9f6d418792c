#include "cpu/reduce.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "core/check.h"

namespace ep::cpu {
namespace {

enum class Simd { kScalar, kAvx2, kAvx512 };

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

Simd simd() {
  static const Simd value = detect_simd();
  return value;
}

}  // namespace

ReduceFn select_reduce(RowType type) {
  ReduceFn fn = simd() == Simd::kAvx512 ? avx512::reduce_fn(type)
                : simd() == Simd::kAvx2 ? avx2::reduce_fn(type)
                                        : scalar::reduce_fn(type);
  EP_CHECK(fn != nullptr, "dtype: rows of type ", static_cast<int>(type), " cannot be summed");
  return fn;
}

const char* simd_name() {
  return simd() == Simd::kAvx512 ? "avx512" : simd() == Simd::kAvx2 ? "avx2" : "scalar";
}

}  // namespace ep::cpu
