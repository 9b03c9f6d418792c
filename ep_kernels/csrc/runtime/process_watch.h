#pragma once

#include <cstdint>

namespace ep {

/// Tells whether a process has ended, also when its id was given to another one since, and whether
/// it is stopped.
class ProcessWatch {
 public:
  ProcessWatch() = default;
  explicit ProcessWatch(int64_t pid);
  ProcessWatch(ProcessWatch&& other) noexcept : pid_(other.pid_), fd_(other.fd_) { other.fd_ = -1; }
  ProcessWatch& operator=(ProcessWatch&& other) noexcept;
  ~ProcessWatch();

  /// False also where the system cannot tell.
  bool has_ended() const;
  /// Whether it was stopped by a signal or a debugger. False also where the system cannot tell.
  bool is_stopped() const;

 private:
  int64_t pid_ = -1;
  int fd_ = -1;
};

}  // namespace ep
