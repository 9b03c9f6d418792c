#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "core/ll_args.h"
#include "cuda/ll_group.h"
#include "cuda/ll_owner.h"

namespace ep::cuda {

/// The low-latency calls of a buffer, in halves. They are enqueued on the caller's stream; nothing
/// waits for the device but wait(), barrier(), unmask() and masked(). Numbers here are the host's,
/// for handles and records; those that ranks share live on the device, so that graphs replay.
class LowLatency {
 public:
  struct Config {
    int64_t region;  ///< pool offset of the region, the same on all ranks
    int64_t region_bytes;
    bool mask_silent_ranks;
    LlFar far{};  ///< ranks whose memory cannot be addressed
  };
  enum class Receive : int32_t { kNow = 0, kAsync = 1, kLater = 2 };
  struct Started {
    int64_t number;  ///< of the call
    int64_t window;  ///< pool offset of this rank's half
  };

  LowLatency(LlOwner& owner, const Config& config);
  ~LowLatency();
  LowLatency(const LowLatency&) = delete;
  LowLatency& operator=(const LowLatency&) = delete;

  Started dispatch(const LlDispatchArgs& args, Receive receive, cudaStream_t stream);
  Started combine(const LlCombineArgs& args, Receive receive, cudaStream_t stream);
  /// The receive half of a call that left it.
  void receive(int64_t number, cudaStream_t stream);
  /// The handle of a dispatch is gone. May be called by any thread at any time.
  void release(int64_t dispatch);
  void barrier(cudaStream_t stream);
  /// Takes part in a call whose arguments this rank rejects, so that every peer learns why.
  void refuse(const std::string& reason, cudaStream_t stream);

  void mask(int rank, cudaStream_t stream);
  /// Takes a masked rank back, which must do the same; all that are masked if `rank` is negative.
  void unmask(int rank, cudaStream_t stream);
  LlRanks masked(cudaStream_t stream);
  /// [kNumLlStamped][kNumLlStamps] of the last calls, by number; waits for `stream`.
  void stamps(uint64_t* out, cudaStream_t stream);

  bool is_finished(int64_t number) const;
  /// Waits for a call on the host, then throws its error.
  void wait(int64_t number);
  /// Throws the error of a finished call.
  void check(int64_t number);
  void make_stream_wait(int64_t number, cudaStream_t stream);

 private:
  static constexpr int kNumRecords = 64;

  /// A place for the rows of one dispatch at a time.
  struct Half {
    int64_t dispatch = -1;  ///< the one that is here
    LlSizes sizes{};
    bool is_received = false, is_combining = false;
  };
  /// The host's side of a record.
  struct Call {
    int64_t number = -1, dispatch = -1;
    int half = 0;
    LlOp op = LlOp::kBarrier;
    bool is_pending = false;   ///< its receive half was not enqueued
    bool is_captured = false;  ///< into a graph, with others in one record
    LlRecord* record = nullptr;
    cudaStream_t stream = nullptr;
    LlDispatchArgs dispatch_args{};
    LlCombineArgs combine_args{};
  };

  void check_usable();
  Call& open_call(LlOp op, cudaStream_t stream);
  void order(cudaStream_t stream);
  void enqueue_receive(Call& call, bool is_whole, cudaStream_t stream);
  void finish(Call& call, Receive receive, cudaStream_t stream);
  LlDispatchCall dispatch_call(const Call& call, bool is_whole) const;
  LlCombineCall combine_call(const Call& call, bool is_whole) const;
  void launch_plain(const Call& call, const std::string& text, cudaStream_t stream);
  template <typename Check>
  void refusing(cudaStream_t stream, Check&& check);

  void drop_released();
  int free_half();
  int half_of(int64_t dispatch) const;
  int held() const;
  void check_fits(const LlSizes& sizes) const;
  const Call* find(int64_t number) const;
  void throw_error(const Call& call);
  void throw_status(const LlRecord& record);
  const LlGroup& group_of(const Call& call);
  std::string refusal(const LlRecord& record) const;
  std::string timeout_text(const LlRecord& record) const;

  LlOwner& owner_;
  Config config_;
  LlGroup group_{};
  int num_local_;  ///< the largest of all ranks
  Half halves_[2];
  int next_half_ = 0;  ///< the one to prefer
  int64_t next_number_ = 0;
  std::vector<Call> calls_;
  LlRecord* records_ = nullptr;    ///< pinned, seen by the device; the last is that of graphs
  cudaStream_t stream_ = nullptr;  ///< for receive halves of asynchronous calls
  cudaStream_t last_stream_ = nullptr;
  unsigned long long last_capture_ = 0;  ///< that last_stream_ was part of, 0 = none
  bool has_last_stream_ = false;
  cudaEvent_t order_event_ = nullptr;
  std::mutex released_mutex_;
  std::vector<int64_t> released_;  ///< dispatches whose handles are gone
};

}  // namespace ep::cuda
