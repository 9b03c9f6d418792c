#pragma once

#include <cstddef>
#include <cstdint>

#include "core/macros.h"
#include "core/math.h"

namespace ep {

/// Hands out consecutive, aligned regions and remembers the end. A layout is written down once, as
/// a walk over its regions; its size and its offsets cannot disagree.
struct Carver {
  size_t end = 0;

  EP_HOST_DEVICE constexpr size_t take(size_t num_bytes, size_t alignment = 64) {
    const size_t begin = align_up(end, alignment);
    end = begin + num_bytes;
    return begin;
  }
};

}  // namespace ep
