#include "runtime/thread_pool.h"

namespace ep {

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(int num_parts, const std::function<void(int)>& part) {
  if (num_parts > 1) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (static_cast<int>(threads_.size()) < num_parts - 1)
      threads_.emplace_back(&ThreadPool::work, this, static_cast<int>(threads_.size()) + 1);
    part_ = &part;
    num_parts_ = num_parts;
    num_running_ = num_parts - 1;
    ++generation_;
    start_.notify_all();
  }
  part(0);
  if (num_parts > 1) {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [&] { return num_running_ == 0; });
    part_ = nullptr;
  }
}

void ThreadPool::work(int index) {
  uint64_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    start_.wait(lock, [&] { return stop_ || (generation_ != seen && part_ != nullptr); });
    if (stop_) return;
    seen = generation_;
    if (index >= num_parts_) continue;
    const std::function<void(int)>* part = part_;
    lock.unlock();
    (*part)(index);
    lock.lock();
    if (--num_running_ == 0) finished_.notify_one();
  }
}

}  // namespace ep
