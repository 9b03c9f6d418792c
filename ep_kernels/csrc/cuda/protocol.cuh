#pragma once

#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/sync.cuh"
#include "cuda/group.h"

// Protocol steps of one block. Every wait is made by one thread per peer and has a deadline; on
// expiry the record goes to the host and the buffer is marked as failed.

namespace ep::cuda {

template <typename T>
__device__ __forceinline__ T* word(const DeviceGroup& group, int rank, size_t offset) {
  return reinterpret_cast<T*>(group.segments[rank] + offset);
}

__device__ __forceinline__ PeerLine& peer_line(const DeviceGroup& group, int owner, int src) {
  return word<PeerLine>(group, owner, group.layout().peer_lines)[src];
}

__device__ __forceinline__ Post& post_of(const DeviceGroup& group, uint64_t seq, int owner,
                                         int src) {
  const ControlLayout layout = group.layout();
  return *word<Post>(group, owner, layout.posts + layout.slot(seq, src) * layout.post_stride);
}

__device__ __forceinline__ int32_t* counts_of(Post& post) {
  return reinterpret_cast<int32_t*>(&post + 1);
}

/// One thread.
/// NOTE: in device memory. Words for the host would delay the flags that are stored next.
__device__ __forceinline__ void stamp(const DeviceGroup& group, Stamp which) {
  group.state->stamps[which] = now_ns();
}

/// Ends the call under way with `status`. Writer: any thread; the first one counts.
__device__ __forceinline__ bool set_status(const DeviceGroup& group, CallStatus status) {
  return atomicCAS(&group.state->call_status, 0, static_cast<int32_t>(status)) == 0;
}

__device__ __forceinline__ bool is_running(const DeviceGroup& group) {
  return *reinterpret_cast<volatile int32_t*>(&group.state->call_status) == 0;
}

__device__ inline void report_timeout(const DeviceGroup& group, CallRecord* record,
                                      const TimeoutRecord& timeout) {
  if (!set_status(group, CallStatus::kTimeout)) return;
  group.state->failed = 1;
  record->timeout = timeout;
  for (int peer = 0; peer < group.num_ranks; ++peer) {
    PeerLine& line = peer_line(group, peer, group.rank);
    line.culprit = timeout.peer;
    line.culprit_phase = timeout.phase;
    store_word(&line.failed, 1u);
  }
}

/// Waits until `flag`, a word of this rank that `peer` writes, reaches `expected`. Ends early when
/// the peer has given up or left, or another thread has ended the call.
__device__ inline bool poll_flag(const DeviceGroup& group, CallRecord* record, const uint64_t* flag,
                                 uint64_t expected, int peer, Phase phase) {
  const uint64_t deadline = now_ns() + group.timeout_ns;
  const PeerLine& line = peer_line(group, group.rank, peer);
  uint64_t seen = 0;
  for (uint32_t spin = 0;; ++spin) {
    seen = load_flag(flag);
    if (seen >= expected) return true;
    if (spin % 64 != 63) continue;
    if (!is_running(group)) return false;
    const bool is_lost = load_word(&line.failed) != 0 || load_word(&line.departed) != 0;
    if (!is_lost && now_ns() < deadline) continue;
    seen = load_flag(flag);
    if (seen >= expected) return true;
    const int culprit = load_word(&line.failed) != 0 && peer != group.rank ? line.culprit : peer;
    report_timeout(group, record,
                   {group.rank, static_cast<int32_t>(phase), culprit,
                    static_cast<int64_t>(expected), static_cast<int64_t>(seen)});
    return false;
  }
}

/// The same, and counts the wait if the call is to. The one thread that waits for this peer.
__device__ inline bool wait_flag(const DeviceGroup& group, CallRecord* record, const uint64_t* flag,
                                 uint64_t expected, int peer, Phase phase) {
  const uint64_t start = group.waited_us ? now_ns() : 0;
  const bool has_come = poll_flag(group, record, flag, expected, peer, phase);
  if (group.waited_us) group.waited_us[peer] += static_cast<int64_t>((now_ns() - start) / 1000);
  return has_come;
}

/// All threads: waits until every peer has finished the call that used this call's slots before.
__device__ inline void wait_slot(const DeviceGroup& group, CallRecord* record, uint64_t seq) {
  if (seq < kNumSlots) return;
  for (int peer = threadIdx.x; peer < group.num_ranks; peer += blockDim.x)
    wait_flag(group, record, &peer_line(group, group.rank, peer).done, seq + 1 - kNumSlots, peer,
              Phase::kSlot);
  __syncthreads();
}

/// All threads: writes the post, and `counts` if given, to every rank; then the flags.
///
/// Order: the stores of all threads, a barrier of the block, the release of each flag.
__device__ inline void send_post(const DeviceGroup& group, uint64_t seq, const PostArgs& post,
                                 const int32_t* counts) {
  const ControlLayout layout = group.layout();
  const int num_counts = group.num_ranks + group.num_experts;
  for (int peer = 0; peer < group.num_ranks; ++peer) {
    Post& to = post_of(group, seq, peer, group.rank);
    for (int i = threadIdx.x; i < kNumPostFields; i += blockDim.x) to.fields[i] = post.fields[i];
    if (threadIdx.x == 0) {
      to.capacity = post.capacity;
      to.offer = post.offer;
    }
    if (post.has_text)
      for (int i = threadIdx.x; i < kMaxText; i += blockDim.x) to.text[i] = post.text[i];
    if (counts)
      for (int i = threadIdx.x; i < num_counts; i += blockDim.x) counts_of(to)[i] = counts[i];
  }
  __syncthreads();
  for (int peer = threadIdx.x; peer < group.num_ranks; peer += blockDim.x)
    store_flag(word<uint64_t>(group, peer, layout.post_flags) + layout.slot(seq, group.rank),
               seq + 1);
}

/// All threads: waits for the posts of all ranks and compares them; keeps offers and capacities.
__device__ inline void wait_posts(const DeviceGroup& group, CallRecord* record, uint64_t seq) {
  const ControlLayout layout = group.layout();
  for (int peer = threadIdx.x; peer < group.num_ranks; peer += blockDim.x) {
    const size_t flag = layout.post_flags + layout.slot(seq, peer) * sizeof(uint64_t);
    if (!wait_flag(group, record, word<uint64_t>(group, group.rank, flag), seq + 1, peer,
                   Phase::kPost))
      continue;
    const Post& post = post_of(group, seq, group.rank, peer);
    group.state->offers[peer] = post.offer;
    group.state->capacities[peer] = post.capacity;
  }
  __syncthreads();
}

/// Tells all ranks that this one is through, and waits until all are. All threads of the block that
/// comes last.
__device__ inline void exchange_done(const DeviceGroup& group, CallRecord* record) {
  LocalState& state = *group.state;
  const uint64_t seq = state.num_calls;
  if (threadIdx.x == 0) stamp(group, kStampMoved);
  if (!state.failed) {
    for (int peer = threadIdx.x; peer < group.num_ranks; peer += blockDim.x)
      store_flag(&peer_line(group, peer, group.rank).done, seq + 1);
    for (int peer = threadIdx.x; peer < group.num_ranks && is_running(group); peer += blockDim.x)
      wait_flag(group, record, &peer_line(group, group.rank, peer).done, seq + 1, peer,
                Phase::kDone);
  }
  __syncthreads();
  if (threadIdx.x == 0) stamp(group, kStampDone);
}

/// Reports to the host, and makes the state ready for the next call. One thread, after all others.
__device__ inline void close_call(const DeviceGroup& group, CallRecord* record) {
  LocalState& state = *group.state;
  const auto status = static_cast<CallStatus>(state.call_status);
  const bool is_new = status != CallStatus::kRunning && status != CallStatus::kSkipped;
  if (is_new || !group.is_captured)
    store_word(reinterpret_cast<uint32_t*>(&record->status),
               static_cast<uint32_t>(status == CallStatus::kRunning ? CallStatus::kOk : status));
  for (int i = 0; i < kNumStamps; ++i) {  // no part of the outcome, so they may come later
    record->stamps[i] = state.stamps[i];
    state.stamps[i] = 0;
  }
  state.bad_choice[0] = INT64_MAX;
  state.call_status = state.failed ? static_cast<int32_t>(CallStatus::kSkipped) : 0;
  state.blocks_done = 0;
  state.next_item = 0;
  ++state.num_calls;
}

/// All threads of the block that comes last.
__device__ inline void finish(const DeviceGroup& group, CallRecord* record) {
  exchange_done(group, record);
  if (threadIdx.x == 0) close_call(group, record);
}

/// The same if another kernel of the call follows, which only works on this rank's own memory.
__device__ inline void hand_over(const DeviceGroup& group, CallRecord* record) {
  exchange_done(group, record);
  if (threadIdx.x == 0) group.state->blocks_done = group.state->next_item = 0;
  let_next_kernel_launch();
}

/// All threads of every block of a kernel that moves rows, at its end: whether this block comes
/// here last. One block waits for peers then, so that waiting takes no room from their kernels on
/// the same device.
///
/// Order: each block's stores, its fence, its arrival; all arrivals, a fence, the release of the
/// flags to peers.
__device__ inline bool is_last_block(const DeviceGroup& group) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    is_last = atomicAdd(&group.state->blocks_done, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

/// Reports the refusal of rank `src`. One that a kernel made says what it found in its fields, one
/// that the host made in its text. One thread.
__device__ inline void report_refusal(const DeviceGroup& group, CallRecord* record,
                                      const Post& post, int src) {
  const int64_t kind = post.fields[kFieldLayout];
  for (int i = 0; i < 3; ++i) record->detail[i] = post.fields[kFieldLayout + 1 + i];
  for (int i = 0; i < kMaxText && kind == 0; ++i) record->text[i] = post.text[i];
  record->rank = src;
  set_status(group, kind == 0 ? CallStatus::kRefused : static_cast<CallStatus>(kind));
}

/// All threads, after wait_posts(): ends the call if a rank refused it or ranks disagree. Every
/// thread compares some fields; the lowest finding counts, so that every rank reports the same:
/// refusals before disagreements, then by rank, then by field.
__device__ inline void check_agreement(const DeviceGroup& group, CallRecord* record, uint64_t seq) {
  constexpr int kNothing = INT32_MAX;
  __shared__ int finding;
  if (threadIdx.x == 0) finding = kNothing;
  __syncthreads();
  const int num_fields = group.num_ranks * kNumPostFields;
  const Post& first = post_of(group, seq, group.rank, 0);
  for (int i = threadIdx.x; i < num_fields && is_running(group); i += blockDim.x) {
    const int src = i / kNumPostFields, field = i % kNumPostFields;
    const int64_t value = post_of(group, seq, group.rank, src).fields[field];
    if (field == kFieldOp && value == static_cast<int64_t>(Op::kRefused)) atomicMin(&finding, src);
    if (value != first.fields[field]) atomicMin(&finding, group.num_ranks + i);
  }
  __syncthreads();
  if (threadIdx.x == 0 && finding != kNothing) {
    if (finding < group.num_ranks) {
      report_refusal(group, record, post_of(group, seq, group.rank, finding), finding);
    } else {
      const int i = finding - group.num_ranks, src = i / kNumPostFields, field = i % kNumPostFields;
      record->rank = src;
      record->detail[0] = field;
      record->detail[1] = first.fields[field];
      record->detail[2] = post_of(group, seq, group.rank, src).fields[field];
      set_status(group, CallStatus::kDisagree);
    }
  }
  __syncthreads();
}

}  // namespace ep::cuda
