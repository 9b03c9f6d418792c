#pragma once

#include <cstdint>
#include <vector>

#include "core/ll_args.h"
#include "core/ll_layout.h"
#include "core/rank_set.h"
#include "cpu/ht.h"

// The transfers of low-latency mode. Who may be written to and read from is settled before.

namespace ep::cpu {

/// One dispatch of this rank, from its send half until the combine of its handle is through.
struct LlDispatch {
  uint64_t number;  ///< of the call
  LlDispatchArgs args;
  RankSet view;                      ///< masked ranks, the same at all that placed rows
  RankSet peers;                     ///< ranks that rows go to and come from
  std::vector<int64_t> windows;      ///< [R] pool offsets of the peers' halves
  std::vector<int64_t> next_row;     ///< [E] first row of this rank's rows for each expert
  std::vector<int32_t> recv_counts;  ///< [L, R] rows of each local expert from each rank
};

/// One combine of this rank, from its send half until it is through.
struct LlCombine {
  uint64_t number;  ///< of the call
  LlCombineArgs args;
  std::vector<int64_t> windows;  ///< [R] pool offsets where the rows of each rank can be read
};

/// Where the halves of all ranks have what, for one call.
class LlHalves {
 public:
  LlHalves(const Transfer& transfer, const LlSizes& sizes);
  const LlHalfLayout& of(int rank) const { return layouts_[rank]; }

 private:
  std::vector<LlHalfLayout> layouts_;
};

/// Fills args.rows: the place of each choice in its expert's block, -1 where nothing is sent.
void place_rows(const Transfer& transfer, LlDispatch& dispatch);

/// Writes this rank's rows to their final place in the windows of their experts' ranks.
void send_rows(const Transfer& transfer, const LlDispatch& dispatch);

/// Zeroes the rows that `src` was to write into this rank's window.
void clear_rows(const Transfer& transfer, const LlDispatch& dispatch, int src);

/// Copies, or compresses, the rows of x that were received into this rank's window.
void stage_rows(const Transfer& transfer, const LlDispatch& dispatch, const LlCombine& combine);

/// Pulls the rows of this rank's tokens from the ranks of `sources`, weighs and sums them.
void reduce_rows(const Transfer& transfer, const LlDispatch& dispatch, const LlCombine& combine,
                 const RankSet& sources);

}  // namespace ep::cpu
