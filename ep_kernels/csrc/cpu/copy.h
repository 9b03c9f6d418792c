#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ep::cpu {

/// How rows are written. Streaming stores leave the caches alone: they do not read the destination
/// first, which for results larger than the caches saves a third of the memory traffic.
enum class Stores { kCached, kStreaming };

/// The better kind for `num_bytes` written in all.
inline Stores choose_stores(int64_t num_bytes) {
  constexpr int64_t kCachedBytes = int64_t{1} << 20;
  return num_bytes > kCachedBytes ? Stores::kStreaming : Stores::kCached;
}

/// Copies one row. Rows are multiples of 16 bytes, do not overlap, and `dst` is aligned to 16.
inline void copy_row(uint8_t* dst, const uint8_t* src, int64_t num_bytes, Stores stores) {
#if defined(__SSE2__)
  if (stores == Stores::kStreaming) {
    constexpr int kStep = 4;
    auto* to = reinterpret_cast<__m128i*>(dst);
    const auto* from = reinterpret_cast<const __m128i*>(src);
    const int64_t count = num_bytes / 16;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      __m128i part[kStep];
      for (int j = 0; j < kStep; ++j) part[j] = _mm_loadu_si128(from + i + j);
      for (int j = 0; j < kStep; ++j) _mm_stream_si128(to + i + j, part[j]);
    }
    for (; i < count; ++i) _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
    return;
  }
#endif
  (void)stores;
  std::memcpy(dst, src, static_cast<size_t>(num_bytes));
}

/// Orders streaming stores before the flag that announces them: a release store alone does not.
inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace ep::cpu
