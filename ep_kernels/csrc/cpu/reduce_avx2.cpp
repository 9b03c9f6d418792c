#include "cpu/reduce.h"

#if defined(__AVX2__)

#include <immintrin.h>

#include "cpu/reduce_vector.h"

namespace ep::cpu::avx2 {
namespace {

struct Floats {
  static constexpr int kWidth = 8;
  using Register = __m256;
  static Register zero() { return _mm256_setzero_ps(); }
  static Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  static Register scale(Register a, float weight) {
    return _mm256_mul_ps(a, _mm256_set1_ps(weight));
  }
  static __m256i is_nan(Register a) {
    return _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
};

struct BF16Vector : Floats {
  using Element = BF16;
  static Register load(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static void store(uint16_t* p, Register sum) {
    const __m256i bits = _mm256_castps_si256(sum);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan(sum));
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);
    const __m256i ordered = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(ordered));
  }
};

struct FP16Vector : Floats {
  using Element = FP16;
  static Register load(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(uint16_t* p, Register sum) {
    const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    const Register clean = _mm256_blendv_ps(sum, quiet, _mm256_castsi256_ps(is_nan(sum)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(clean, 0));
  }
};

struct FP32Vector : Floats {
  using Element = FP32;
  static Register load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Register sum) {
    const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    _mm256_storeu_ps(p, _mm256_blendv_ps(sum, quiet, _mm256_castsi256_ps(is_nan(sum))));
  }
};

struct FP64Vector {
  using Element = FP64;
  static constexpr int kWidth = 4;
  using Register = __m256d;
  static Register zero() { return _mm256_setzero_pd(); }
  static Register add(Register a, Register b) { return _mm256_add_pd(a, b); }
  static Register scale(Register a, float weight) {
    return _mm256_mul_pd(a, _mm256_set1_pd(double{weight}));
  }
  static Register load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Register sum) {
    const __m256d quiet = _mm256_castsi256_pd(_mm256_set1_epi64x(0x7ff8000000000000));
    _mm256_storeu_pd(p, _mm256_blendv_pd(sum, quiet, _mm256_cmp_pd(sum, sum, _CMP_UNORD_Q)));
  }
};

}  // namespace

ReduceFn reduce_fn(RowType type) {
  switch (type) {
    case RowType::kBF16:
      return reduce_vectors<BF16Vector>;
    case RowType::kFP16:
      return reduce_vectors<FP16Vector>;
    case RowType::kFP32:
      return reduce_vectors<FP32Vector>;
    case RowType::kFP64:
      return reduce_vectors<FP64Vector>;
    case RowType::kFP8:
      break;
  }
  return nullptr;
}

}  // namespace ep::cpu::avx2

#else

namespace ep::cpu::avx2 {
ReduceFn reduce_fn(RowType type) { return scalar::reduce_fn(type); }
}  // namespace ep::cpu::avx2

#endif
