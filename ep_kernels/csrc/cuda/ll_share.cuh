#pragma once

#include "core/math.h"
#include "cuda/ll_far_layout.cuh"
#include "cuda/ll_posts.cuh"
#include "cuda/ll_rows.cuh"

// What one block of a dispatch sends, and where it goes. The block's choices lie in shared memory,
// a wave of tokens at a time:
//
//   count     rows of the tokens before the share, for each expert
//   place     each choice of a wave: its row relative to this rank's first row for the expert
//   resolve   its row among those of all ranks, once their counts are here, and its address
//   send      a piece of a token's row to all choices of the token

namespace ep::cuda {

constexpr int kLlSendThreads = 1024;
constexpr int kLlSendWarps = kLlSendThreads / kWarpSize;
constexpr int kLlMaxSlots = 2048;  ///< choices that a block places at once

/// A choice of a token: first what is known before the posts come, then where it goes.
union LlSlot {
  struct {
    int32_t expert;
    int32_t row;    ///< among this rank's rows for the expert
    int32_t rank;   ///< that has the expert; -1 = none
    int32_t local;  ///< which of its experts
  } choice;
  LlTarget target;
};

/// One block's share of a dispatch. Pieces are numbered token by token.
template <typename Format>
struct LlShare {
  const LlGroup& g;
  const LlDispatchCall& call;
  const LlBoard& board;  ///< the posts, once they have come
  int32_t* next;         ///< [E] rows of this rank for each expert, so far
  LlSlot* slots;         ///< of the tokens of a wave
  uint64_t number;
  int begin, end;  ///< pieces
  int pieces_per_token, tokens_per_wave;

  __device__ int num_topk() const { return call.args.sizes.num_topk; }
  __device__ int first_token() const { return begin / pieces_per_token; }
  __device__ int end_token() const { return ceil_div(end, pieces_per_token); }
  __device__ int wave_end(int first) const { return min(first + tokens_per_wave, end_token()); }
  __device__ bool is_expert(int64_t expert) const {
    return expert >= 0 && expert < g.group.num_experts;
  }

  /// All threads: counts the choices of the first `num_tokens` tokens.
  __device__ void count(int num_tokens) const {
    for (int i = threadIdx.x; i < g.group.num_experts; i += blockDim.x) next[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < num_tokens * num_topk(); i += blockDim.x) {
      const int64_t expert = call.args.topk_idx[i];
      if (is_expert(expert)) atomicAdd(next + expert, 1);
    }
    __syncthreads();
  }

  /// All threads: places the tokens of a wave by the order of tokens.
  __device__ void place(int first) const {
    const int num_choices = (wave_end(first) - first) * num_topk();
    for (int i = threadIdx.x; i < num_choices; i += blockDim.x) {
      const int64_t expert = call.args.topk_idx[first * num_topk() + i];
      auto& choice = slots[i].choice;
      choice.expert = is_expert(expert) ? static_cast<int32_t>(expert) : -1;
      choice.rank = rank_of_choice(g.group.placement, choice.expert);
      choice.local = choice.expert < 0 ? 0 : g.group.placement.local_of[choice.expert];
    }
    __syncthreads();
    if (threadIdx.x >= kWarpSize) return;
    for (int token = 0; token < wave_end(first) - first; ++token) {
      for (int k = threadIdx.x; k < num_topk(); k += kWarpSize) {
        auto& choice = slots[token * num_topk() + k].choice;
        if (choice.expert >= 0) choice.row = next[choice.expert]++;
      }
      __syncwarp();
    }
  }

  /// Rows for an expert of the ranks before this one, among `peers`, whose posts have come. -1: the
  /// count of one of them has not.
  __device__ int32_t rows_before(int expert, LlRanks peers, uint64_t deadline) const {
    constexpr int kAtOnce = 8;  // loads under way
    const int rank = g.group.rank;
    int32_t sum = 0;
    for (int first = 0; first < rank; first += kAtOnce) {
      uint64_t counts[kAtOnce];
      bool are_there = false;
      while (!are_there) {
        are_there = true;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          counts[i] = first + i < rank && ll_has(peers, first + i)
                          ? load_relaxed(ll_tagged_counts(g, number, rank, first + i) + expert)
                          : ll_tag(number, 0);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) are_there &= ll_has_tag(counts[i], number);
        if (are_there || now_ns() <= deadline) continue;
        for (int i = 0; i < kAtOnce; ++i)
          if (!ll_has_tag(counts[i], number)) ll_lose_count(g, number, first + i);
        return -1;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += static_cast<int32_t>(counts[i]);
    }
    return sum;
  }

  /// All threads: turns the choices of a wave into targets among the rows of `peers`.
  __device__ void resolve(int first, LlRanks peers) const {
    const LlSizes& sizes = call.args.sizes;
    const uint64_t deadline = now_ns() + g.group.timeout_ns;
    __syncthreads();
    const int num_choices = (wave_end(first) - first) * num_topk();
    for (int i = threadIdx.x; i < num_choices; i += blockDim.x) {
      const auto choice = slots[i].choice;
      int32_t row = -1;
      LlTarget target{};
      if (choice.rank >= 0 && ll_has(peers, choice.rank) && ll_is_far(g, choice.rank)) {
        row = choice.row;
        target = ll_far_target(g, sizes, call.half, choice.expert, row);
      } else if (choice.rank >= 0 && ll_has(peers, choice.rank)) {
        const int32_t before = rows_before(choice.expert, peers, deadline);
        if (before >= 0) row = choice.row + before;
      }
      if (row >= 0 && !target.row) {
        const LlHalfLayout half(sizes, g.group.num_ranks, g.num_local[choice.rank]);
        const auto at = static_cast<int>(board.posts[choice.rank].word[kLlWordWindow]);
        uint8_t* window = ll_window(g, choice.rank, at);
        target = {window + half.row(choice.local, row),
                  window + ll_scale_offset(half, sizes, choice.local, row)};
      }
      slots[i].target = target;
      if ((first + i / num_topk()) * pieces_per_token < begin) continue;  // another block's token
      call.args.experts[first * num_topk() + i] = choice.expert;
      call.args.rows[first * num_topk() + i] = row;
    }
    __syncthreads();
  }
  __device__ LlPiece load(int piece) const {
    return Format::load(call.args, piece / pieces_per_token, piece % pieces_per_token,
                        threadIdx.x % kWarpSize);
  }

  /// One warp: sends a piece to where the choices of its token go.
  __device__ void send(int piece, const LlPiece& loaded, int first) const {
    const int token = piece / pieces_per_token;
    const int number_in_row = piece % pieces_per_token;
    const int64_t stride = call.args.sizes.num_max_tokens_per_rank * g.group.num_ranks;
    const LlSlot* of_token = slots + (token - first) * num_topk();
    for (int k = 0; k < num_topk(); ++k) {
      const LlTarget target = of_token[k].target;
      if (target.row)
        Format::store(call.args, loaded, target, number_in_row,
                      ll_is_far_target(g, target) ? 1 : stride, threadIdx.x % kWarpSize);
    }
  }

  /// The pieces of a wave that are this warp's: from, step, to.
  __device__ int first_piece(int first) const {
    return max(begin, first * pieces_per_token) + static_cast<int>(threadIdx.x) / kWarpSize;
  }
  __device__ int end_piece(int first) const { return min(end, wave_end(first) * pieces_per_token); }

  /// All threads: sends the pieces of a wave, those from `skip` rounds on.
  __device__ void send_wave(int first, int skip) const {
    for (int piece = first_piece(first) + skip * kLlSendWarps; piece < end_piece(first);
         piece += kLlSendWarps)
      send(piece, load(piece), first);
  }

  /// All threads: sends the waves from `first` on.
  __device__ void send_from(int first, LlRanks peers) const {
    for (; first < end_token(); first = wave_end(first)) {
      __syncthreads();
      place(first);
      resolve(first, peers);
      send_wave(first, 0);
    }
  }
};

/// Whether block 0 has no rows to send: it would come too late to both of its tasks.
__device__ __forceinline__ bool ll_has_leader() {
  constexpr unsigned kMinBlocks = 8;
  return gridDim.x >= kMinBlocks;
}

template <typename Format>
__device__ LlShare<Format> make_share(const LlGroup& g, const LlDispatchCall& call,
                                      const LlBoard& board, uint64_t number, void* shared) {
  const LlSizes& sizes = call.args.sizes;
  const int per_token = static_cast<int>(ceil_div(sizes.hidden, int64_t{Format::kChannels}));
  const int num_leaders = ll_has_leader() ? 1 : 0,
            part = static_cast<int>(blockIdx.x) - num_leaders;
  const int64_t num_pieces = sizes.num_tokens * per_token;
  const Range range =
      part < 0 ? Range{0, 0} : split_evenly(num_pieces, part, gridDim.x - num_leaders);
  auto* next = static_cast<int32_t*>(shared);
  auto* slots = reinterpret_cast<LlSlot*>(next + align_up(g.group.num_experts, 4));
  const int wave = max(1, kLlMaxSlots / sizes.num_topk);
  return {g,
          call,
          board,
          next,
          slots,
          number,
          static_cast<int>(range.begin),
          static_cast<int>(range.end),
          per_token,
          wave};
}

}  // namespace ep::cuda
