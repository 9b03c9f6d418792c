#include "runtime/process_watch.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fstream>
#include <string>
#include <utility>

namespace ep {

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

ProcessWatch::ProcessWatch(int64_t pid)
    : pid_(pid), fd_(static_cast<int>(::syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0))) {}

ProcessWatch& ProcessWatch::operator=(ProcessWatch&& other) noexcept {
  std::swap(pid_, other.pid_);
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

bool ProcessWatch::is_stopped() const {
  std::ifstream file("/proc/" + std::to_string(pid_) + "/stat");
  std::string text;
  std::getline(file, text);  // "pid (name) state ...", and the name may have any characters
  const size_t end_of_name = text.rfind(") ");
  if (end_of_name == std::string::npos || has_ended()) return false;
  const char state = text[end_of_name + 2];
  return state == 'T' || state == 't';
}

}  // namespace ep
