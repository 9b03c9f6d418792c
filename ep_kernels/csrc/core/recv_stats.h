#pragma once

#include <cstdint>

#include "core/macros.h"

namespace ep {

/// Adds to the caller's statistics of an expert: `stats` is [L] int32 or int64, by the bytes of an
/// element.
EP_HOST_DEVICE void add_recv_tokens(void* stats, int64_t element_bytes, int local, int64_t count) {
  if (element_bytes == 8) {
    static_cast<int64_t*>(stats)[local] += count;
  } else {
    static_cast<int32_t*>(stats)[local] += static_cast<int32_t>(count);
  }
}

}  // namespace ep
