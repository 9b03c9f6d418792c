// Low-latency combine on the host: the transfer.
//
//   all threads   copy or compress the rows of x into this rank's window          stage_rows
//   all threads   pull the rows of each token, weigh and sum them in order        reduce_rows
//
// Posts and completion are in cpu/low_latency.cpp.

#include <algorithm>

#include "core/math.h"
#include "cpu/copy.h"
#include "cpu/ll.h"
#include "cpu/ll_cast.h"
#include "cpu/reduce.h"

namespace ep::cpu {
namespace {

/// Bytes from a compressed row to its scales: they follow it.
int64_t wire_scales(int64_t hidden) { return align_up(hidden, int64_t{64}); }

/// Puts rows where peers read them. Each may be there already: x may be the combine buffer.
class Stager {
 public:
  Stager(int64_t hidden, LlWire wire, Stores stores)
      : hidden_(hidden), wire_(wire), stores_(stores) {}

  void stage(const uint16_t* from, uint8_t* to) {
    const auto* from_bytes = reinterpret_cast<const uint8_t*>(from);
    if (wire_ == LlWire::kFP8) {
      auto* scales = reinterpret_cast<float*>(to + wire_scales(hidden_));
      const uint16_t* row = from_bytes == to ? copy(from) : from;
      select_fp8_kernels().cast(row, hidden_, /*is_rounded=*/false, to, scales);
    } else if (from_bytes != to) {
      copy_row(to, from_bytes, hidden_ * 2, stores_);
    }
  }

 private:
  /// NOTE: the scales of a row land in bytes of it that the cast has not read yet.
  const uint16_t* copy(const uint16_t* row) {
    scratch_.assign(row, row + hidden_);
    return scratch_.data();
  }

  int64_t hidden_;
  LlWire wire_;
  Stores stores_;
  std::vector<uint16_t> scratch_;
};

/// The rows of one token, in the order of its choices.
struct TokenRows {
  std::vector<const void*> rows;
  std::vector<float> weights;
};

class Reducer {
 public:
  Reducer(const Transfer& transfer, const LlDispatch& dispatch, const LlCombine& combine,
          const RankSet& sources)
      : transfer_(transfer),
        sizes_(dispatch.args.sizes),
        combine_(combine),
        sources_(sources),
        halves_(transfer, sizes_),
        reduce_(select_reduce(RowType::kBF16)) {}

  void run(Range tokens) const {
    TokenRows list;
    std::vector<float> sum(is_compressed() ? sizes_.hidden : 0);
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      collect(token, list);
      uint16_t* out = combine_.args.out + token * sizes_.hidden;
      if (is_compressed()) {
        decompress(list, sum.data(), out);
      } else {
        reduce_({out, list.rows.data(), nullptr, static_cast<int>(list.rows.size()), 0,
                 sizes_.hidden, list.weights.data()});
      }
    }
  }

 private:
  bool is_compressed() const { return static_cast<LlWire>(combine_.args.wire) == LlWire::kFP8; }

  void collect(int64_t token, TokenRows& list) const {
    const LlCombineArgs& args = combine_.args;
    list.rows.clear();
    list.weights.clear();
    for (int64_t i = token * sizes_.num_topk; i < (token + 1) * sizes_.num_topk; ++i) {
      if (args.rows[i] < 0) continue;
      const int src = transfer_.group.placement.rank_of[args.experts[i]];
      if (!sources_.has(src)) continue;
      list.rows.push_back(
          row(src, transfer_.group.placement.local_of[args.experts[i]], args.rows[i]));
      list.weights.push_back(args.topk_weights[i]);
    }
  }

  const void* row(int src, int64_t local, int64_t row) const {
    const LlHalfLayout& half = halves_.of(src);
    if (src == transfer_.group.rank && !is_compressed())  // own rows were not staged
      return combine_.args.x + (local * half.rows_per_expert + row) * sizes_.hidden;
    return transfer_.exchange.pool(src) + combine_.windows[src] + half.combine_row(local, row);
  }

  void decompress(const TokenRows& list, float* sum, uint16_t* out) const {
    const Fp8Kernels& kernels = select_fp8_kernels();
    std::fill_n(sum, sizes_.hidden, 0.0f);
    for (size_t i = 0; i < list.rows.size(); ++i) {
      const auto* row = static_cast<const uint8_t*>(list.rows[i]);
      const auto* scales = reinterpret_cast<const float*>(row + wire_scales(sizes_.hidden));
      kernels.accumulate(row, scales, list.weights[i], sizes_.hidden, sum);
    }
    kernels.round(sum, sizes_.hidden, out);
  }

  const Transfer& transfer_;
  const LlSizes& sizes_;
  const LlCombine& combine_;
  const RankSet& sources_;
  LlHalves halves_;
  ReduceFn reduce_;
};

}  // namespace

void stage_rows(const Transfer& transfer, const LlDispatch& dispatch, const LlCombine& combine) {
  if (combine.args.is_zero_copy) return;
  const LlSizes& sizes = dispatch.args.sizes;
  const int rank = transfer.group.rank, num_ranks = transfer.group.num_ranks;
  const int num_local = num_local_experts(transfer.group, rank);
  const LlHalfLayout half(sizes, num_ranks, num_local);
  const auto wire = static_cast<LlWire>(combine.args.wire);
  uint8_t* window = transfer.exchange.pool(rank) + dispatch.windows[rank];
  int64_t num_rows = 0;
  for (int32_t count : dispatch.recv_counts) num_rows += count;
  const Stores stores = choose_stores(num_rows * half.combine_row_bytes);
  transfer.threads.run(sizes.num_threads, [&](int thread) {
    int64_t row_of_all = 0;
    Stager stager(sizes.hidden, wire, stores);
    const Range part = split_evenly(num_rows, thread, sizes.num_threads);
    for (int local = 0; local < num_local; ++local) {
      int64_t row = 0;
      for (int src = 0; src < num_ranks; ++src) {
        const int32_t count = dispatch.recv_counts[local * num_ranks + src];
        const bool is_read_here = src == rank && wire == LlWire::kBF16;
        for (int32_t i = 0; i < count; ++i, ++row, ++row_of_all) {
          if (is_read_here || row_of_all < part.begin || row_of_all >= part.end) continue;
          const int64_t from = (local * half.rows_per_expert + row) * sizes.hidden;
          stager.stage(combine.args.x + from, window + half.combine_row(local, row));
        }
      }
    }
    finish_stores();
  });
}

void reduce_rows(const Transfer& transfer, const LlDispatch& dispatch, const LlCombine& combine,
                 const RankSet& sources) {
  const Reducer reducer(transfer, dispatch, combine, sources);
  const LlSizes& sizes = dispatch.args.sizes;
  transfer.threads.run(sizes.num_threads, [&](int thread) {
    reducer.run(split_evenly(sizes.num_tokens, thread, sizes.num_threads));
  });
}

}  // namespace ep::cpu
