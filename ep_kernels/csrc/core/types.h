#pragma once

#include <cstdint>

namespace ep {

/// Order of the rows that dispatch delivers.
enum class Layout : int32_t {
  kRankMajor = 0,    ///< one row per (token, destination rank), by source rank, then token
  kExpertMajor = 1,  ///< one row per (token, local expert), by expert, then source rank, then token
};

/// Element type of a row. FP8 rows only travel; the others can also be summed.
enum class RowType : int32_t { kBF16 = 0, kFP16 = 1, kFP32 = 2, kFP64 = 3, kFP8 = 4 };

/// Type of the scales that travel with a row; they are not looked at.
enum class ScaleType : int32_t { kNone = 0, kFP32 = 1, kInt32 = 2 };

constexpr int64_t element_bytes(RowType type) {
  switch (type) {
    case RowType::kBF16:
    case RowType::kFP16:
      return 2;
    case RowType::kFP32:
      return 4;
    case RowType::kFP64:
      return 8;
    case RowType::kFP8:
      return 1;
  }
  return 0;
}

}  // namespace ep
