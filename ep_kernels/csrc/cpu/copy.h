#pragma once

#include <cstdint>
#include <cstring>

namespace ep::cpu {

/// Copies one row. Rows are multiples of 16 bytes and do not overlap.
inline void copy_row(uint8_t* dst, const uint8_t* src, int64_t num_bytes) {
  std::memcpy(dst, src, static_cast<size_t>(num_bytes));
}

}  // namespace ep::cpu
