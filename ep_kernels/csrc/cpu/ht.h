#pragma once

#include <vector>

#include "core/ht_args.h"
#include "core/ht_plan.h"
#include "cpu/exchange.h"
#include "runtime/thread_pool.h"

namespace ep::cpu {

/// What the transfers of one rank work with.
struct Transfer {
  const Group& group;
  Exchange& exchange;
  ThreadPool& threads;
};

/// Writes this rank's rows to their final place in the pools of their destinations.
void send_rows(const Transfer& transfer, const HtDispatchArgs& args,
               const std::vector<Offer>& offers);

/// Fills what no peer writes in this rank's own results: alignment padding and unused rows.
void fill_padding(const Transfer& transfer, const HtDispatchArgs& args);

/// Counts the tokens of a dispatch that is over in its caller's statistics.
void add_recv_stats(const Group& group, const HtDispatchArgs& args);

/// Copies the rows of `x` that peers will read into this rank's pool, where `x` is not there yet.
void stage_rows(const Transfer& transfer, const HtCombineArgs& args);

/// Reads the rows of this rank's tokens from wherever they are, and sums them.
void reduce_rows(const Transfer& transfer, const HtCombineArgs& args,
                 const std::vector<Offer>& offers);

}  // namespace ep::cpu
