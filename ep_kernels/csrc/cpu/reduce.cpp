#include "cpu/reduce.h"

#include "core/check.h"
#include "cpu/simd.h"

namespace ep::cpu {

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
