#pragma once

#include <cstddef>
#include <cstdint>

namespace ep {

/// One rank's shared memory: POSIX pages of an anonymous memory file, mapped by the owner and its
/// peers. The file has no name, so nothing is left behind however the processes end; peers open
/// it through the owner's /proc entry, which only the same user may do. Pages cost memory when
/// they are first touched, so a segment can be larger than the memory of the machine.
class SharedSegment {
 public:
  SharedSegment() = default;

  /// Creates and maps a segment. Throws DeviceError.
  static SharedSegment create(size_t num_bytes);

  /// Maps the segment that process `pid` holds open as `fd`. Throws DeviceError.
  static SharedSegment open(int64_t pid, int fd, size_t num_bytes);

  SharedSegment(SharedSegment&& other) noexcept { swap(other); }
  SharedSegment& operator=(SharedSegment&& other) noexcept {
    swap(other);
    return *this;
  }
  ~SharedSegment();

  uint8_t* data() const { return data_; }
  size_t size() const { return num_bytes_; }
  int fd() const { return fd_; }

  /// Closes the file once every peer has mapped it; the mapping stays.
  void close_file();

 private:
  void swap(SharedSegment& other) noexcept;
  void map(size_t num_bytes);

  uint8_t* data_ = nullptr;
  size_t num_bytes_ = 0;
  int fd_ = -1;
};

}  // namespace ep
