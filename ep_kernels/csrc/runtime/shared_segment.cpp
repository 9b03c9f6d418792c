#include "runtime/shared_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "core/check.h"

namespace ep {

SharedSegment SharedSegment::create(size_t num_bytes) {
  SharedSegment segment;
  segment.fd_ = ::memfd_create("ep_kernels", MFD_CLOEXEC);
  EP_CHECK_OS(segment.fd_ >= 0, "cannot create a shared-memory file");
  EP_CHECK_OS(::ftruncate(segment.fd_, static_cast<off_t>(num_bytes)) == 0,
              "cannot size a shared-memory file to ", num_bytes, " bytes (pool_bytes)");
  segment.map(num_bytes);
  return segment;
}

SharedSegment SharedSegment::open(int64_t pid, int fd, size_t num_bytes) {
  const std::string path = concat("/proc/", pid, "/fd/", fd);
  SharedSegment segment;
  segment.fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  EP_CHECK_OS(segment.fd_ >= 0, "cannot open the memory of a peer through ", path,
              "; the ranks of a buffer must run on one machine, as one user, in one PID namespace");
  segment.map(num_bytes);
  segment.close_file();
  return segment;
}

SharedSegment::~SharedSegment() {
  if (data_ != nullptr) ::munmap(data_, num_bytes_);
  close_file();
}

void SharedSegment::close_file() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void SharedSegment::swap(SharedSegment& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  std::swap(fd_, other.fd_);
}

void SharedSegment::map(size_t num_bytes) {
  void* address =
      ::mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
  EP_CHECK_OS(address != MAP_FAILED, "cannot map ", num_bytes,
              " bytes of shared memory (a smaller pool_bytes may fit)");
  data_ = static_cast<uint8_t*>(address);
  num_bytes_ = num_bytes;
  ::madvise(data_, num_bytes_, MADV_HUGEPAGE);  // taken where the system allows it
}

}  // namespace ep
