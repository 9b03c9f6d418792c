#include "runtime/op_queue.h"

#include <chrono>

namespace ep {
namespace {

int64_t now_ns() {
  const auto since_start = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since_start).count();
}

}  // namespace

void PendingOp::run() {
  const int64_t begin_ns = now_ns();
  std::exception_ptr error;
  try {
    body_();
  } catch (...) {
    error = std::current_exception();
  }
  std::lock_guard<std::mutex> lock(mutex_);
  error_ = error;
  interval_ = {begin_ns, now_ns()};
  body_ = nullptr;
  is_finished_ = true;
  finished_.notify_all();
}

bool PendingOp::is_finished() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return is_finished_;
}

void PendingOp::wait() const {
  std::unique_lock<std::mutex> lock(mutex_);
  finished_.wait(lock, [&] { return is_finished_; });
}

void PendingOp::rethrow() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error_) std::rethrow_exception(error_);
}

PendingOp::Interval PendingOp::interval() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return interval_;
}

OpQueue::~OpQueue() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void OpQueue::run(const std::shared_ptr<PendingOp>& op) {
  if (!claim_or_enqueue(op)) {
    op->wait();
    return;
  }
  op->run();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_busy_ = false;
  }
  changed_.notify_all();
}

/// True: the queue was idle and is now busy with `op`, which the caller runs. False: it was queued.
bool OpQueue::claim_or_enqueue(const std::shared_ptr<PendingOp>& op) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (is_busy_ || !waiting_.empty()) {
    enqueue_locked(op);
    return false;
  }
  is_busy_ = true;
  return true;
}

void OpQueue::submit(const std::shared_ptr<PendingOp>& op) {
  std::lock_guard<std::mutex> lock(mutex_);
  enqueue_locked(op);
}

void OpQueue::drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return !is_busy_ && waiting_.empty(); });
}

void OpQueue::enqueue_locked(const std::shared_ptr<PendingOp>& op) {
  if (!thread_.joinable()) thread_ = std::thread(&OpQueue::work, this);
  waiting_.push_back(op);
  changed_.notify_all();
}

void OpQueue::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stop_ || (!is_busy_ && !waiting_.empty()); });
    if (waiting_.empty() && stop_) return;
    if (is_busy_ || waiting_.empty()) continue;
    std::shared_ptr<PendingOp> op = std::move(waiting_.front());
    waiting_.pop_front();
    is_busy_ = true;
    lock.unlock();
    op->run();
    op.reset();
    lock.lock();
    is_busy_ = false;
    changed_.notify_all();
  }
}

}  // namespace ep
