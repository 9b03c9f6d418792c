#pragma once

#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/ll_args.h"
#include "core/ll_protocol.h"
#include "core/macros.h"

// Where things are in the low-latency region of a rank. docs/low-latency.md shows the picture.

namespace ep {

constexpr size_t kLlAlignment = 4096;

/// Words behind a post: on the GPU its words by halves, then the counts; on the CPU the counts
/// only.
EP_HOST_DEVICE constexpr size_t ll_tagged_words(int num_experts) {
  return 2 * (offsetof(LlPost, text) / sizeof(uint64_t)) + static_cast<size_t>(num_experts);
}

/// Byte offsets of the control words in the region.
///
///   | mask lines [R] | post flags [S][R] | done lines [S][R] | posts [S][R] |
struct LlControlLayout {
  size_t mask_lines, post_flags, done_lines, posts, num_bytes;
  size_t post_stride;
  int num_ranks;

  EP_HOST_DEVICE constexpr LlControlLayout(int ranks, int num_experts)
      : mask_lines(0),
        post_flags(0),
        done_lines(0),
        posts(0),
        num_bytes(0),
        post_stride(
            align_up(sizeof(LlPost) + sizeof(uint64_t) * ll_tagged_words(num_experts), size_t{64})),
        num_ranks(ranks) {
    const size_t num_slots = static_cast<size_t>(kNumLlSlots) * ranks;
    Carver carve;
    mask_lines = carve.take(sizeof(LlMaskLine) * ranks);
    post_flags = carve.take(sizeof(uint64_t) * num_slots);
    done_lines = carve.take(sizeof(LlDoneLine) * num_slots);
    posts = carve.take(post_stride * num_slots);
    num_bytes = align_up(carve.end, kLlAlignment);
  }

  /// Slot of source rank `src` for call `number`, in every array of slots.
  EP_HOST_DEVICE constexpr size_t slot(uint64_t number, int src) const {
    return (number % kNumLlSlots) * static_cast<size_t>(num_ranks) + src;
  }
};

/// Bytes of the scales of a row.
EP_HOST_DEVICE constexpr int64_t ll_scale_bytes(LlFormat format, int64_t hidden) {
  if (format == LlFormat::kBF16) return 0;
  return hidden / kScaleGroup * (format == LlFormat::kFP8UE8M0 ? 1 : 4);
}

/// Byte offsets in one half, for one call.
///
///   | x [L, R * M, H] | scales, transposed [L, groups, R * M] |  ...  | combine [L, R * M, H] |
///
/// The first part always has room for bf16 rows, so that the sizes alone decide what fits.
struct LlHalfLayout {
  int64_t rows_per_expert;    ///< R * M
  int64_t row_bytes;          ///< of a row received
  int64_t combine_row_bytes;  ///< of a bf16 row
  size_t x, scales, combine, num_bytes;

  EP_HOST_DEVICE constexpr LlHalfLayout(const LlSizes& sizes, int num_ranks, int num_local_experts)
      : rows_per_expert(sizes.num_max_tokens_per_rank * num_ranks),
        row_bytes(sizes.hidden * (sizes.format == 0 ? 2 : 1)),
        combine_row_bytes(sizes.hidden * 2),
        x(0),
        scales(0),
        combine(0),
        num_bytes(0) {
    const size_t num_rows = static_cast<size_t>(rows_per_expert) * num_local_experts;
    Carver carve;
    x = carve.take(num_rows * combine_row_bytes);
    scales = x + align_up(num_rows * row_bytes, size_t{64});
    combine = carve.take(num_rows * combine_row_bytes);
    num_bytes = align_up(carve.end, kLlAlignment);
  }

  /// Offset of row `row` of a local expert, among the rows received.
  EP_HOST_DEVICE constexpr size_t row(int64_t local_expert, int64_t row) const {
    return x + static_cast<size_t>((local_expert * rows_per_expert + row) * row_bytes);
  }
  /// The same among the rows for combine, whose rows on the wire may be shorter than bf16.
  EP_HOST_DEVICE constexpr size_t combine_row(int64_t local_expert, int64_t row) const {
    return combine +
           static_cast<size_t>((local_expert * rows_per_expert + row) * combine_row_bytes);
  }
};

/// Bytes that a region must have for calls of these sizes. `num_local_experts` is the largest L.
EP_HOST_DEVICE constexpr int64_t ll_region_bytes(const LlSizes& sizes, int num_ranks,
                                                 int num_experts, int num_local_experts) {
  return static_cast<int64_t>(LlControlLayout(num_ranks, num_experts).num_bytes +
                              2 * LlHalfLayout(sizes, num_ranks, num_local_experts).num_bytes);
}

/// Bytes of each half of a region, 0 if there is no room.
EP_HOST_DEVICE constexpr int64_t ll_half_bytes(int64_t region_bytes, size_t control_bytes) {
  const int64_t rest = region_bytes - static_cast<int64_t>(control_bytes);
  const int64_t alignment = static_cast<int64_t>(kLlAlignment);
  return rest <= 0 ? 0 : rest / 2 / alignment * alignment;
}

}  // namespace ep
