// Low-latency dispatch on the host: the transfer, once every rank knows where its rows go.
//
//   one thread    the row of each choice                                     place_rows
//   all threads   cast each token once; copy it to the final place of each choice    send_rows
//   one thread    zero the rows of a rank that did not send them             clear_rows
//
// Posts, views and completion are in cpu/low_latency.cpp.

#include "core/fp8.h"
#include "core/math.h"
#include "cpu/copy.h"
#include "cpu/ll.h"
#include "cpu/ll_cast.h"

namespace ep::cpu {
namespace {

/// What a token becomes before it is sent: its row, and the scales of it.
class CastRow {
 public:
  explicit CastRow(const LlSizes& sizes)
      : sizes_(sizes), format_(static_cast<LlFormat>(sizes.format)) {
    if (format_ == LlFormat::kBF16) return;
    bytes_.resize(sizes.hidden);
    scales_.resize(sizes.hidden / kScaleGroup);
    packed_.resize(scales_.size() / 4);
  }

  const uint8_t* row() const { return row_; }

  void load(const uint16_t* x) {
    row_ = reinterpret_cast<const uint8_t*>(x);
    if (format_ == LlFormat::kBF16) return;
    select_fp8_kernels().cast(x, sizes_.hidden, format_ != LlFormat::kFP8, bytes_.data(),
                              scales_.data());
    row_ = bytes_.data();
    if (format_ != LlFormat::kFP8UE8M0) return;
    for (size_t i = 0; i < packed_.size(); ++i) {
      const float* scales = scales_.data() + 4 * i;
      packed_[i] = ue8m0(scales[0]) | ue8m0(scales[1]) << 8 | ue8m0(scales[2]) << 16 |
                   static_cast<uint32_t>(ue8m0(scales[3])) << 24;
    }
  }

  /// Writes the scales of the row; those of the next channels lie `stride` elements further.
  void store_scales(uint8_t* first, int64_t stride) const {
    const bool is_packed = format_ == LlFormat::kFP8UE8M0;
    const size_t count = is_packed ? packed_.size() : scales_.size();
    const void* scales = is_packed ? static_cast<const void*>(packed_.data()) : scales_.data();
    const auto* from = static_cast<const uint8_t*>(scales);
    for (size_t i = 0; i < count; ++i) std::memcpy(first + i * stride * 4, from + 4 * i, 4);
  }

 private:
  const LlSizes& sizes_;
  LlFormat format_;
  const uint8_t* row_ = nullptr;
  std::vector<uint8_t> bytes_;
  std::vector<float> scales_;
  std::vector<uint32_t> packed_;
};

/// Offset of the first scale of a row in its half.
size_t scale_offset(const LlHalfLayout& half, const LlSizes& sizes, int64_t local, int64_t row) {
  const int64_t scale_bytes = ll_scale_bytes(static_cast<LlFormat>(sizes.format), sizes.hidden);
  return half.scales + static_cast<size_t>(local * scale_bytes * half.rows_per_expert + 4 * row);
}

}  // namespace

LlHalves::LlHalves(const Transfer& transfer, const LlSizes& sizes) {
  for (int rank = 0; rank < transfer.group.num_ranks; ++rank)
    layouts_.emplace_back(sizes, transfer.group.num_ranks, num_local_experts(transfer.group, rank));
}

void place_rows(const Transfer& transfer, LlDispatch& dispatch) {
  const LlDispatchArgs& args = dispatch.args;
  for (int64_t i = 0; i < args.sizes.num_tokens * args.sizes.num_topk; ++i) {
    const int64_t expert = args.topk_idx[i];
    const bool is_sent =
        expert >= 0 && dispatch.peers.has(transfer.group.placement.rank_of[expert]);
    args.experts[i] = static_cast<int32_t>(expert);
    args.rows[i] = is_sent ? static_cast<int32_t>(dispatch.next_row[expert]++) : -1;
  }
}

void send_rows(const Transfer& transfer, const LlDispatch& dispatch) {
  const LlDispatchArgs& args = dispatch.args;
  const LlSizes& sizes = args.sizes;
  const Placement& placement = transfer.group.placement;
  const LlHalves halves(transfer, sizes);
  const int64_t row_bytes = halves.of(transfer.group.rank).row_bytes;
  const Stores stores = choose_stores(sizes.num_tokens * sizes.num_topk * row_bytes);
  transfer.threads.run(sizes.num_threads, [&](int thread) {
    const Range tokens = split_evenly(sizes.num_tokens, thread, sizes.num_threads);
    CastRow cast(sizes);
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      cast.load(args.x + token * sizes.hidden);
      for (int64_t i = token * sizes.num_topk; i < (token + 1) * sizes.num_topk; ++i) {
        if (args.rows[i] < 0) continue;
        const int dst = placement.rank_of[args.experts[i]];
        const int local = placement.local_of[args.experts[i]];
        const LlHalfLayout& half = halves.of(dst);
        uint8_t* window = transfer.exchange.pool(dst) + dispatch.windows[dst];
        copy_row(window + half.row(local, args.rows[i]), cast.row(), row_bytes, stores);
        if (sizes.format != 0)
          cast.store_scales(window + scale_offset(half, sizes, local, args.rows[i]),
                            half.rows_per_expert);
      }
    }
    finish_stores();
  });
}

void clear_rows(const Transfer& transfer, const LlDispatch& dispatch, int src) {
  const LlSizes& sizes = dispatch.args.sizes;
  const int rank = transfer.group.rank, num_ranks = transfer.group.num_ranks;
  const int num_local = num_local_experts(transfer.group, rank);
  const LlHalfLayout half(sizes, num_ranks, num_local);
  uint8_t* window = transfer.exchange.pool(rank) + dispatch.windows[rank];
  const int64_t num_scales = ll_scale_bytes(static_cast<LlFormat>(sizes.format), sizes.hidden) / 4;
  for (int local = 0; local < num_local; ++local) {
    const int32_t* counts = dispatch.recv_counts.data() + local * num_ranks;
    int64_t first = 0;
    for (int before = 0; before < src; ++before) first += counts[before];
    std::memset(window + half.row(local, first), 0, counts[src] * half.row_bytes);
    uint8_t* scales = window + scale_offset(half, sizes, local, first);
    for (int64_t i = 0; i < num_scales; ++i)
      std::memset(scales + i * half.rows_per_expert * 4, 0, counts[src] * 4);
  }
}

}  // namespace ep::cpu
