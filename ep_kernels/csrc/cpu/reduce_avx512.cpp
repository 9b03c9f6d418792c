#include "cpu/reduce.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)

// NOTE: GCC 12's own header reads the undefined registers that it hands to masked instructions.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "cpu/reduce_vector.h"

namespace ep::cpu::avx512 {
namespace {

struct Floats {
  static constexpr int kWidth = 16;
  using Register = __m512;
  static Register zero() { return _mm512_setzero_ps(); }
  static Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  static Register scale(Register a, float weight) {
    return _mm512_mul_ps(a, _mm512_set1_ps(weight));
  }
  static Register clean(Register a) {
    const __m512 quiet = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
    return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
  }
};

struct BF16Vector : Floats {
  using Element = BF16;
  static Register load(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // NOTE: not vcvtneps2bf16, which flushes subnormal sums to zero.
  static void store(uint16_t* p, Register sum) {
    const __m512i bits = _mm512_castps_si512(sum);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q),
                                    _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
};

struct FP16Vector : Floats {
  using Element = FP16;
  static Register load(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(uint16_t* p, Register sum) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(clean(sum), 0));
  }
};

struct FP32Vector : Floats {
  using Element = FP32;
  static Register load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Register sum) { _mm512_storeu_ps(p, clean(sum)); }
};

struct FP64Vector {
  using Element = FP64;
  static constexpr int kWidth = 8;
  using Register = __m512d;
  static Register zero() { return _mm512_setzero_pd(); }
  static Register add(Register a, Register b) { return _mm512_add_pd(a, b); }
  static Register scale(Register a, float weight) {
    return _mm512_mul_pd(a, _mm512_set1_pd(double{weight}));
  }
  static Register load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Register sum) {
    const __m512d quiet = _mm512_castsi512_pd(_mm512_set1_epi64(0x7ff8000000000000));
    const __mmask8 is_nan = _mm512_cmp_pd_mask(sum, sum, _CMP_UNORD_Q);
    _mm512_storeu_pd(p, _mm512_mask_mov_pd(sum, is_nan, quiet));
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

}  // namespace ep::cpu::avx512

#else

namespace ep::cpu::avx512 {
ReduceFn reduce_fn(RowType type) { return avx2::reduce_fn(type); }
}  // namespace ep::cpu::avx512

#endif
