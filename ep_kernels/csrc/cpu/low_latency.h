#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/ll.h"
#include "cpu/ll_exchange.h"

namespace ep::cpu {

/// The low-latency calls of a buffer, in halves: the send half runs when the call is made, the
/// receive half at once, on the buffer's queue, or when receive() is called.
class LowLatency {
 public:
  struct Config {
    LlExchange::Config exchange;
    int64_t region_bytes;
  };
  enum class Receive : int32_t { kNow = 0, kAsync = 1, kLater = 2 };
  /// What the caller learns when the send half is over.
  struct Started {
    uint64_t number;                ///< of the call
    int64_t window;                 ///< pool offset of this rank's half
    std::shared_ptr<PendingOp> op;  ///< null if the receive half is left to receive()
  };

  LowLatency(Buffer& buffer, const Config& config);

  Started dispatch(const LlDispatchArgs& args, Receive receive);
  Started combine(const LlCombineArgs& args, Receive receive);
  /// The receive half of a call that left it.
  void receive(uint64_t number);
  /// The handle of a dispatch is gone. May be called by any thread at any time.
  void release(uint64_t dispatch);
  void barrier();
  /// Takes part in a call whose arguments this rank rejects, so that every peer learns why.
  void refuse(const std::string& reason);

  void mask(int rank);
  /// Takes a masked rank back, which must do the same; all that are masked if `rank` is negative.
  void unmask(int rank);
  RankSet masked();

 private:
  /// A place for the rows of one dispatch at a time.
  struct Half {
    int64_t window;                        ///< pool offset
    RankSet strangers;                     ///< masked ranks that never heard of this window
    uint64_t last = 0;                     ///< number + 1 of the last dispatch that was here
    std::shared_ptr<LlDispatch> dispatch;  ///< the one that is here
    bool is_received = false, is_combining = false;
  };
  /// A window that masked ranks may still write to.
  struct Quarantine {
    int64_t window;
    uint64_t number;  ///< of the call that gave it up
  };
  /// A call whose receive half is not over.
  struct Call {
    uint64_t number = 0;
    LlOp op = LlOp::kDispatch;
    int half = 0;
    RankSet peers;    ///< who is waited for
    RankSet arrived;  ///< who came
    bool is_collected = false;
    std::vector<int64_t> waited_us;  ///< [R]
    std::vector<LlPost> posts;       ///< [R] of a combine
    LlCombine combine;
  };

  void failing(const std::function<void()>& step);
  void run(const std::function<void()>& body);
  void refusing(const std::function<void()>& check);
  Started finish(const std::shared_ptr<Call>& call, Receive receive);

  std::shared_ptr<Call> send_dispatch(const LlDispatchArgs& args);
  std::shared_ptr<Call> send_combine(const LlCombineArgs& args);
  void receive_call(Call& call);
  void receive_dispatch(Call& call);
  void receive_combine(Call& call);
  void refuse_call(const std::string& reason);
  void post_refusal(uint64_t number, int attempt, const std::string& reason);

  uint64_t open_call();
  void collect(Call& call);
  std::vector<LlPost> agree(uint64_t number, Half* half, LlPost& mine, const int32_t* counts);
  void adopt(int peer, const RankSet& masked);
  void check_no_reader(const std::vector<LlPost>& posts) const;
  void check_agreement(const std::vector<LlPost>& posts, const RankSet& members) const;
  LlPost make_post(LlOp op, const LlSizes& sizes) const;
  std::shared_ptr<LlDispatch> make_dispatch(uint64_t number, const LlDispatchArgs& args,
                                            const LlPost& mine,
                                            const std::vector<LlPost>& posts) const;

  int free_half();
  int half_of(uint64_t dispatch) const;
  void check_fits(const LlSizes& sizes) const;
  void drop_released();
  void refresh_window(Half& half, uint64_t number);
  void refresh_window_or_refuse(Half& half, uint64_t number, int attempt);
  void end_quarantines();
  RankSet active_ranks() const;
  std::exception_ptr unmask_one(int rank);

  Buffer& buffer_;
  Config config_;
  LlExchange exchange_;
  int64_t half_bytes_;
  Half halves_[2];
  int next_half_ = 0;  ///< the one to prefer
  uint64_t next_number_ = 0;
  std::vector<std::shared_ptr<Call>> calls_;
  std::vector<Quarantine> quarantines_;
  std::mutex released_mutex_;
  std::vector<uint64_t> released_;  ///< dispatches whose handles are gone
};

}  // namespace ep::cpu
