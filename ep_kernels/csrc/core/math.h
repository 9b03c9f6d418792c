#pragma once

#include <cstddef>
#include <cstdint>

#include "core/macros.h"

namespace ep {

template <typename T>
EP_HOST_DEVICE constexpr T ceil_div(T x, T y) {
  return (x + y - 1) / y;
}

template <typename T>
EP_HOST_DEVICE constexpr T align_up(T x, T alignment) {
  return ceil_div(x, alignment) * alignment;
}

/// The half-open range of `num_items` that belongs to `part` of `num_parts`; sizes differ by at
/// most one. Example: 10 items in 4 parts -> [0,3) [3,6) [6,8) [8,10).
struct Range {
  int64_t begin, end;
};

EP_HOST_DEVICE constexpr Range split_evenly(int64_t num_items, int64_t part, int64_t num_parts) {
  const int64_t base = num_items / num_parts, extra = num_items % num_parts;
  const int64_t begin = part * base + (part < extra ? part : extra);
  return {begin, begin + base + (part < extra ? 1 : 0)};
}

}  // namespace ep
