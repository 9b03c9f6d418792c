#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace ep {

/// Workers that run the parts of one job at a time; the caller is one of them.
class ThreadPool {
 public:
  ThreadPool() = default;
  ~ThreadPool();

  /// Calls part(i) for every i in [0, num_parts), each on a thread of its own, and returns when all
  /// are done. Starts missing threads. The parts must not throw.
  void run(int num_parts, const std::function<void(int)>& part);

 private:
  void work(int index);

  std::mutex mutex_;
  std::condition_variable start_, finished_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* part_ = nullptr;
  int num_parts_ = 0, num_running_ = 0;
  uint64_t generation_ = 0;
  bool stop_ = false;
};

}  // namespace ep
