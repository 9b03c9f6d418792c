// Where every row goes, computed by all ranks alike.
//
//   count    each block   masks of the tokens that chose an expert, a rank; their sizes count_chunk
//   notify   last block   chunk counts -> first rows within this rank scan_chunks
//                         counts to all ranks, counts of all ranks                        exchange
//                         first rows of this rank on every rank, sizes of own results     place_*
//   plan     each block   row of each choice = first row of its chunk + tokens before it
//   plan_kernel

#include <algorithm>

#include "core/math.h"
#include "core/types.h"
#include "cuda/check_cuda.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/protocol.cuh"

namespace ep::cuda {
namespace {

constexpr int kMaskWords = kChunkTokens / 32;
constexpr int kNumThreads = 512;
constexpr int kChunksAtOnce = 8;
constexpr int64_t kNoBadChoice = INT64_MAX;

/// For every column (rank, then expert) the set of the chunk's tokens that chose it, in shared
/// memory: [num_ranks + num_experts, kMaskWords].
struct ChunkMasks {
  uint32_t* words;

  __device__ bool insert(int column, int token) {
    const uint32_t bit = 1u << (token % 32);
    return (atomicOr(&words[column * kMaskWords + token / 32], bit) & bit) == 0;
  }
  __device__ int size(int column) const { return size_before(column, kChunkTokens); }
  /// Tokens before `token` in the set.
  __device__ int size_before(int column, int token) const {
    int count = 0;
#pragma unroll
    for (int word = 0; word < kMaskWords; ++word) {
      const int num_bits = token - word * 32;
      const uint32_t below = num_bits >= 32 ? ~0u : num_bits <= 0 ? 0u : (1u << num_bits) - 1;
      count += __popc(words[column * kMaskWords + word] & below);
    }
    return count;
  }
};

/// Bad entries of topk_idx: the one with the lowest index is reported.
__device__ void note_bad_choice(const DeviceGroup& group, CallStatus kind, int64_t index) {
  const int64_t code = index * 2 + (kind == CallStatus::kTwice);
  atomicMin(reinterpret_cast<long long*>(group.state->bad_choice), static_cast<long long>(code));
}

/// Fills the masks of chunk `blockIdx.x`. All threads.
__device__ void fill_masks(const DeviceGroup& group, const HtDispatchArgs& args,
                           ChunkMasks& masks) {
  const int num_columns = group.num_ranks + group.num_experts;
  for (int i = threadIdx.x; i < num_columns * kMaskWords; i += blockDim.x) masks.words[i] = 0;
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kChunkTokens * args.sizes.num_topk;
  const int64_t end = min(first + int64_t{kChunkTokens} * args.sizes.num_topk,
                          args.sizes.num_tokens * args.sizes.num_topk);
  for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) {
    const int64_t expert = args.routing.topk_idx[i];
    if (expert == -1) continue;
    if (expert < 0 || expert >= group.num_experts) {
      note_bad_choice(group, CallStatus::kBadExpert, i);
      continue;
    }
    const int token = static_cast<int>((i - first) / args.sizes.num_topk);
    if (!masks.insert(group.num_ranks + static_cast<int>(expert), token))
      note_bad_choice(group, CallStatus::kTwice, i);
    masks.insert(group.placement.rank_of[expert], token);
  }
  __syncthreads();
}

/// The sizes of the columns of chunk `blockIdx.x`. All threads.
__device__ void count_chunk(const DeviceGroup& group, const HtDispatchArgs& args, int32_t* scratch,
                            uint32_t* shared_words) {
  ChunkMasks masks{shared_words};
  fill_masks(group, args, masks);
  const int num_columns = group.num_ranks + group.num_experts;
  for (int column = threadIdx.x; column < num_columns; column += blockDim.x)
    scratch[int64_t{blockIdx.x} * num_columns + column] = masks.size(column);
}

/// What a handle holds if the call fails: choices that are served nowhere.
__device__ void clear_choices(const HtDispatchArgs& args) {
  const int64_t count = args.sizes.num_tokens * args.sizes.num_topk;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride)
    args.routing.rows[i] = args.routing.routes[i] = kNoRoute;
}

/// Whether no earlier choice of the token of choice `index` lands on the same rank.
__device__ bool is_first_on_rank(const DeviceGroup& group, const HtDispatchArgs& args,
                                 int64_t index) {
  const int64_t* topk_idx = args.routing.topk_idx;
  const int rank = group.placement.rank_of[topk_idx[index]];
  for (int64_t other = index - index % args.sizes.num_topk; other < index; ++other)
    if (rank_of_choice(group.placement, topk_idx[other]) == rank) return false;
  return true;
}

__global__ void __launch_bounds__(kNumThreads)
    plan_kernel(const __grid_constant__ DeviceGroup group,
                const __grid_constant__ HtDispatchArgs args, const int32_t* scratch) {
  extern __shared__ uint32_t shared_words[];
  ChunkMasks masks{shared_words};
  fill_masks(group, args, masks);  // reads nothing that the kernel before writes
  wait_for_kernel_before();
  let_next_kernel_launch();
  if (!is_running(group)) return clear_choices(args);
  const bool by_expert = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
  const int num_topk = args.sizes.num_topk;
  const int32_t* first_rows = scratch + int64_t{blockIdx.x} * (group.num_ranks + group.num_experts);
  const int64_t first = int64_t{blockIdx.x} * kChunkTokens * num_topk;
  const int64_t end =
      min(first + int64_t{kChunkTokens} * num_topk, args.sizes.num_tokens * num_topk);
  for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) {
    const int64_t expert = args.routing.topk_idx[i];
    int32_t row = -1, route = kNoRoute;
    if (expert >= 0) {
      const int dst = group.placement.rank_of[expert];
      const int column = by_expert ? group.num_ranks + static_cast<int>(expert) : dst;
      row =
          first_rows[column] + masks.size_before(column, static_cast<int>((i - first) / num_topk));
      route = by_expert || is_first_on_rank(group, args, i) ? dst : dst | kSharedRow;
      const int64_t capacity = group.state->capacities[dst];
      if (capacity >= 0 && row >= capacity) row = route = kNoRoute;
    }
    args.routing.rows[i] = row;
    args.routing.routes[i] = route;
  }
}

/// Replaces each chunk's counts by the counts of the chunks before it; the totals follow the last
/// chunk. All threads, a column each.
__device__ int32_t* scan_chunks(const DeviceGroup& group, int32_t* scratch, int64_t chunks) {
  const int num_columns = group.num_ranks + group.num_experts;
  int32_t* totals = scratch + chunks * num_columns;
  for (int column = threadIdx.x; column < num_columns; column += blockDim.x) {
    int32_t sum = 0;
    for (int64_t first = 0; first < chunks; first += kChunksAtOnce) {
      int32_t counts[kChunksAtOnce];  // all loads are under way before the first store
#pragma unroll
      for (int i = 0; i < kChunksAtOnce; ++i)
        counts[i] = first + i < chunks ? __ldcg(&scratch[(first + i) * num_columns + column]) : 0;
#pragma unroll
      for (int i = 0; i < kChunksAtOnce; ++i) {
        if (first + i < chunks) scratch[(first + i) * num_columns + column] = sum;
        sum += counts[i];
      }
    }
    totals[column] = sum;
  }
  __syncthreads();
  return totals;
}

/// What a rank that found a bad choice posts instead: it refuses the call, and says which.
__device__ void fill_refusal(const HtDispatchArgs& args, int64_t code, PostArgs& refusal) {
  const int64_t index = code / 2;
  const CallStatus kind = code % 2 ? CallStatus::kTwice : CallStatus::kBadExpert;
  refusal.fields[kFieldOp] = static_cast<int64_t>(Op::kRefused);
  refusal.fields[kFieldLayout] = static_cast<int64_t>(kind);
  refusal.fields[kFieldLayout + 1] = index / args.sizes.num_topk;
  refusal.fields[kFieldLayout + 2] = index % args.sizes.num_topk;
  refusal.fields[kFieldLayout + 3] = args.routing.topk_idx[index];
  refusal.has_text = 0;
}

/// Sums over ranks of every column of the count matrix, in shared memory.
struct ColumnSums {
  int64_t* total;   ///< rows of all ranks
  int32_t* before;  ///< rows of the ranks before this one; meaningless if there are too many rows
};

__device__ void sum_columns(const DeviceGroup& group, uint64_t seq, const ColumnSums& sums) {
  const int num_columns = group.num_ranks + group.num_experts;
  for (int column = threadIdx.x; column < num_columns; column += blockDim.x) {
    int64_t total = 0;
#pragma unroll 8
    for (int src = 0; src < group.num_ranks; ++src) {
      if (src == group.rank) sums.before[column] = static_cast<int32_t>(total);
      total += counts_of(post_of(group, seq, group.rank, src))[column];
    }
    sums.total[column] = total;
  }
  __syncthreads();
}

/// All threads: who sends how many tokens to whom.
__device__ void fill_rank_counts(const DeviceGroup& group, const HtDispatchArgs& args,
                                 uint64_t seq) {
  for (int i = threadIdx.x; i < group.num_ranks * group.num_ranks; i += blockDim.x) {
    const int src = i / group.num_ranks, dst = i % group.num_ranks;
    args.routing.rank_counts[i] = counts_of(post_of(group, seq, group.rank, src))[dst];
  }
}

/// Inclusive sum over the lanes of a warp.
__device__ int64_t scan_lanes(int64_t value, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

/// The lowest rank that would receive more rows than can be numbered, and how many. One word, so
/// that an atomic minimum finds it: rank, then rows. All ranks find the same.
struct TooManyRows {
  static constexpr unsigned long long kNobody = ~0ull;
  static constexpr int kRowBits = 56;
  unsigned long long* word;  ///< in shared memory

  __device__ void check(int rank, int64_t num_rows) const {
    if (num_rows > INT32_MAX)
      atomicMin(word, static_cast<unsigned long long>(rank) << kRowBits | num_rows);
  }
  __device__ int rank() const { return static_cast<int>(*word >> kRowBits); }
  __device__ int64_t num_rows() const {
    return static_cast<int64_t>(*word & ((1ull << kRowBits) - 1));
  }
};

/// Adds to the sums' `before` where each expert's group begins on its rank, and fills this rank's
/// own groups. A warp per rank goes through the experts, 32 at a time.
__device__ void place_groups(const DeviceGroup& group, const HtDispatchArgs& args,
                             const ColumnSums& sums, const TooManyRows& too_many) {
  const int lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  for (int dst = threadIdx.x / 32; dst < group.num_ranks; dst += num_warps) {
    int64_t end_of_groups = 0, num_real_rows = 0;
    for (int first = 0; first < group.num_experts; first += 32) {
      const int expert = first + lane, column = group.num_ranks + expert;
      const bool is_here = expert < group.num_experts && group.placement.rank_of[expert] == dst;
      const int64_t total = is_here ? sums.total[column] : 0;
      const int64_t size = align_up(total, int64_t{args.sizes.expert_alignment});
      const int64_t end = end_of_groups + scan_lanes(size, lane);
      if (is_here) sums.before[column] += static_cast<int32_t>(end - size);
      if (is_here && dst == group.rank) {
        const int local = group.placement.local_of[expert];
        args.routing.expert_offsets[local + 1] = end;
      }
      end_of_groups = __shfl_sync(kAllLanes, end, 31);
      num_real_rows += __shfl_sync(kAllLanes, scan_lanes(total, lane), 31);
    }
    if (lane == 0) too_many.check(dst, end_of_groups);
    if (dst != group.rank || lane != 0) continue;
    args.routing.recv_sizes[0] = end_of_groups;
    args.routing.recv_sizes[1] = num_real_rows;
  }
  __syncthreads();
}

/// What a handle holds if the call fails: nothing received. All threads.
__device__ void clear_receiver(const DeviceGroup& group, const HtDispatchArgs& args) {
  const bool by_expert = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
  const int num_local = group.num_local_experts, num_groups = by_expert ? num_local : 1;
  for (int i = threadIdx.x; i < num_local; i += blockDim.x)
    args.routing.num_recv_tokens_per_expert[i] = 0;
  for (int i = threadIdx.x; i <= num_local; i += blockDim.x) args.routing.expert_offsets[i] = 0;
  for (int i = threadIdx.x; i < 2 * num_groups; i += blockDim.x) args.routing.own_rows[i] = 0;
  if (threadIdx.x < 3) args.routing.recv_sizes[threadIdx.x] = 0;
  for (int i = threadIdx.x; i < group.num_ranks * group.num_ranks; i += blockDim.x)
    args.routing.rank_counts[i] = 0;
  __syncthreads();
}

/// All threads: where the groups are, if there are any. False: too many rows, the call has ended.
__device__ bool place_rows(const DeviceGroup& group, const HtDispatchArgs& args,
                           const ColumnSums& sums, CallRecord* record) {
  __shared__ unsigned long long word;
  const TooManyRows too_many{&word};
  if (threadIdx.x == 0) word = TooManyRows::kNobody;
  __syncthreads();
  if (static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor) {
    place_groups(group, args, sums, too_many);
  } else {
    for (int dst = threadIdx.x; dst < group.num_ranks; dst += blockDim.x)
      too_many.check(dst, sums.total[dst]);
    __syncthreads();
  }
  if (word == TooManyRows::kNobody) return true;
  clear_receiver(group, args);
  if (threadIdx.x == 0 && set_status(group, CallStatus::kTooManyRows)) {
    record->rank = too_many.rank();
    record->detail[0] = too_many.num_rows();
    __threadfence_system();
    store_word(&record->has_sizes, kSizesNever);
  }
  return false;
}

/// The receiver's part of the routing that does not depend on the layout's group starts.
__device__ void fill_receiver(const DeviceGroup& group, const HtDispatchArgs& args,
                              const ColumnSums& sums, const int32_t* own_counts) {
  const bool by_expert = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
  for (int expert = threadIdx.x; expert < group.num_experts; expert += blockDim.x) {
    if (group.placement.rank_of[expert] != group.rank) continue;
    const int local = group.placement.local_of[expert], column = group.num_ranks + expert;
    args.routing.num_recv_tokens_per_expert[local] = sums.total[column];
    if (!by_expert) continue;
    args.routing.own_rows[2 * local] = sums.before[column];
    args.routing.own_rows[2 * local + 1] = sums.before[column] + own_counts[column];
  }
  if (!by_expert && threadIdx.x == 0) {
    const int column = group.rank;
    args.routing.recv_sizes[0] = args.routing.recv_sizes[1] = sums.total[column];
    args.routing.own_rows[0] = sums.before[column];
    args.routing.own_rows[1] = sums.before[column] + own_counts[column];
  }
  __syncthreads();
}

/// All threads: rows that arrive for this rank but lie past its capacity.
__device__ void count_overflow(const DeviceGroup& group, const HtDispatchArgs& args) {
  const int64_t capacity = args.sizes.capacity;
  if (capacity < 0) return;
  if (static_cast<Layout>(args.sizes.layout) == Layout::kRankMajor) {
    if (threadIdx.x == 0)
      args.routing.recv_sizes[2] = max(int64_t{0}, args.routing.recv_sizes[1] - capacity);
    return;
  }
  auto* overflow = reinterpret_cast<unsigned long long*>(args.routing.recv_sizes + 2);
  for (int local = threadIdx.x; local < group.num_local_experts; local += blockDim.x) {
    const int64_t count = args.routing.num_recv_tokens_per_expert[local];
    const int64_t room = max(int64_t{0}, capacity - args.routing.expert_offsets[local]);
    atomicAdd(overflow, static_cast<unsigned long long>(count - min(count, room)));
  }
}

/// All threads: tells the host how much memory to take, and where the groups are.
__device__ void publish_sizes(const HtDispatchArgs& args, int num_local_experts,
                              CallRecord* record) {
  const HtRouting& routing = args.routing;
  const bool by_expert = static_cast<Layout>(args.sizes.layout) == Layout::kExpertMajor;
  for (int local = threadIdx.x; local < num_local_experts; local += blockDim.x) {
    record->num_recv_tokens_per_expert[local] = routing.num_recv_tokens_per_expert[local];
    if (by_expert) record->expert_offsets[local + 1] = routing.expert_offsets[local + 1];
  }
  if (threadIdx.x < 3) record->recv_sizes[threadIdx.x] = routing.recv_sizes[threadIdx.x];
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) store_word(&record->has_sizes, kSizesValid);
}

/// All threads: this rank's counts go out, everybody's come in. False: the call has ended.
__device__ bool exchange(const DeviceGroup& group, const HtDispatchArgs& args, const PostArgs& post,
                         const int32_t* own_counts, CallRecord* record) {
  __shared__ PostArgs refusal;
  const uint64_t seq = group.state->num_calls;
  const int64_t bad_choice = group.state->bad_choice[0];
  if (bad_choice != kNoBadChoice && threadIdx.x == 0) fill_refusal(args, bad_choice, refusal);
  wait_slot(group, record, seq);
  __syncthreads();
  if (bad_choice == kNoBadChoice)
    send_post(group, seq, post, own_counts);
  else
    send_post(group, seq, refusal, own_counts);
  wait_posts(group, record, seq);
  check_agreement(group, record, seq);
  if (threadIdx.x == 0) stamp(group, kStampAgreed);
  if (threadIdx.x == 0 && !is_running(group)) {
    __threadfence_system();
    store_word(&record->has_sizes, kSizesNever);
  }
  __syncthreads();
  return is_running(group);
}

/// All threads of the block that counted last.
__device__ void notify(const DeviceGroup& group, const HtDispatchArgs& args, const PostArgs& post,
                       int32_t* scratch, CallRecord* record) {
  extern __shared__ int64_t shared_sums[];
  const int64_t chunks = gridDim.x;
  clear_receiver(group, args);
  if (!is_running(group)) return;
  const int num_columns = group.num_ranks + group.num_experts;
  const ColumnSums sums{shared_sums, reinterpret_cast<int32_t*>(shared_sums + num_columns)};

  const int32_t* own_counts = scan_chunks(group, scratch, chunks);
  if (!exchange(group, args, post, own_counts, record)) return;
  let_next_kernel_launch();
  sum_columns(group, group.state->num_calls, sums);
  fill_rank_counts(group, args, group.state->num_calls);
  if (!place_rows(group, args, sums, record)) return;
  fill_receiver(group, args, sums, own_counts);
  count_overflow(group, args);
  __syncthreads();
  publish_sizes(args, group.num_local_experts, record);
  if (threadIdx.x == 0) stamp(group, kStampSized);
  for (int64_t i = threadIdx.x; i < chunks * num_columns; i += blockDim.x)
    scratch[i] += sums.before[i % num_columns];
}

__global__ void __launch_bounds__(kNumThreads)
    notify_kernel(const __grid_constant__ DeviceGroup group,
                  const __grid_constant__ HtDispatchArgs args,
                  const __grid_constant__ PostArgs post, int32_t* scratch, CallRecord* record) {
  extern __shared__ uint32_t shared_words[];
  __shared__ bool is_last;
  if (blockIdx.x == 0 && threadIdx.x == 0) stamp(group, kStampBegin);
  count_chunk(group, args, scratch, shared_words);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(&group.state->blocks_done, 1u) == gridDim.x - 1;
    __threadfence();
    if (is_last) group.state->blocks_done = 0;
  }
  __syncthreads();
  if (is_last) notify(group, args, post, scratch, record);
}

template <typename Kernel>
void allow_shared_memory(Kernel* kernel, size_t num_bytes) {
  constexpr size_t kDefaultLimit = 40 << 10;  // of 48 KiB, with room for what kernels declare
  if (num_bytes > kDefaultLimit)
    EP_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(num_bytes)));
}

size_t mask_bytes(const DeviceGroup& group) {
  return size_t{sizeof(uint32_t)} * kMaskWords * (group.num_ranks + group.num_experts);
}

unsigned num_blocks(const HtDispatchArgs& args) {
  return static_cast<unsigned>(num_chunks(args.sizes.num_tokens));
}

}  // namespace

int64_t num_chunks(int64_t num_tokens) {
  return std::max(int64_t{1}, ceil_div(num_tokens, int64_t{kChunkTokens}));
}

void launch_notify(const DeviceGroup& group, const HtDispatchArgs& args, const PostArgs& post,
                   int32_t* scratch, CallRecord* record, cudaStream_t stream) {
  static_assert(kMaskWords >= 3, "the sums of columns take the place of the masks");
  allow_shared_memory(notify_kernel, mask_bytes(group));
  notify_kernel<<<num_blocks(args), kNumThreads, mask_bytes(group), stream>>>(group, args, post,
                                                                              scratch, record);
  EP_CHECK_CUDA(cudaGetLastError());
}

void launch_plan(const DeviceGroup& group, const HtDispatchArgs& args, const int32_t* scratch,
                 cudaStream_t stream) {
  if (args.sizes.num_tokens == 0) return;
  allow_shared_memory(plan_kernel, mask_bytes(group));
  const LaunchShape shape{static_cast<int>(num_blocks(args)), kNumThreads,
                          static_cast<int>(mask_bytes(group))};
  launch_early(plan_kernel, shape, stream, group, args, scratch);
}

}  // namespace ep::cuda
