#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace ep {

/// One call on its way: runs once, then holds its error, if any.
class PendingOp {
 public:
  /// When the call ran, in nanoseconds of the monotonic clock.
  struct Interval {
    int64_t begin_ns = 0, end_ns = 0;
  };

  explicit PendingOp(std::function<void()> body) : body_(std::move(body)) {}

  void run();
  bool is_finished() const;
  void wait() const;

  /// Throws what the body threw. Only after it has finished.
  void rethrow() const;

  /// Only after it has finished.
  Interval interval() const;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable finished_;
  std::function<void()> body_;
  std::exception_ptr error_;
  Interval interval_;
  bool is_finished_ = false;
};

/// Runs the calls of one buffer one after the other, in the order of submission: what a
/// communication stream is on a GPU. A call that nobody has to wait behind runs on the caller's
/// thread; the others on a thread of the queue, which starts when it is first needed.
class OpQueue {
 public:
  ~OpQueue();

  /// Runs `op` after all before it and returns when it has finished.
  void run(const std::shared_ptr<PendingOp>& op);

  /// Returns at once; `op` runs after all before it.
  void submit(const std::shared_ptr<PendingOp>& op);

  /// Waits until everything submitted has finished.
  void drain();

 private:
  bool claim_or_enqueue(const std::shared_ptr<PendingOp>& op);
  void enqueue_locked(const std::shared_ptr<PendingOp>& op);
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<PendingOp>> waiting_;
  std::thread thread_;
  bool is_busy_ = false;  // an op runs, on whichever thread
  bool stop_ = false;
};

}  // namespace ep
