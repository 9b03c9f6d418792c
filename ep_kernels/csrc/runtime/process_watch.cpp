#include "runtime/process_watch.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

namespace ep {

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

ProcessWatch::ProcessWatch(int64_t pid)
    : fd_(static_cast<int>(::syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0))) {}

ProcessWatch& ProcessWatch::operator=(ProcessWatch&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

ProcessWatch::~ProcessWatch() {
  if (fd_ >= 0) ::close(fd_);
}

bool ProcessWatch::has_ended() const {
  if (fd_ < 0) return false;
  pollfd query{fd_, POLLIN, 0};
  return ::poll(&query, 1, 0) == 1 && (query.revents & POLLIN) != 0;
}

}  // namespace ep
