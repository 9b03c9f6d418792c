#pragma once

namespace ep::cpu {

enum class Simd { kScalar, kAvx2, kAvx512 };

/// The best instruction set of this processor. The environment variable EP_KERNELS_SIMD (scalar,
/// avx2 or avx512) lowers it; throws ConfigError for any other value.
Simd simd();

}  // namespace ep::cpu
