#pragma once

#include <cstdint>

namespace ep {

/// Tells whether a process has ended, also when its id was given to another one since.
class ProcessWatch {
 public:
  ProcessWatch() = default;
  explicit ProcessWatch(int64_t pid);
  ProcessWatch(ProcessWatch&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  ProcessWatch& operator=(ProcessWatch&& other) noexcept;
  ~ProcessWatch();

  /// False also where the system cannot tell.
  bool has_ended() const;

 private:
  int fd_ = -1;
};

}  // namespace ep
