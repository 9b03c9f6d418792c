#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

namespace ep {

/// Root of everything the library throws; bindings/c_api.cpp turns it into a status and a message.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The caller passed something unsupported, or ranks disagree. Python: EPConfigError.
struct ConfigError : Error {
  using Error::Error;
};

/// A peer refused the call, or ranks disagree about it: known to every rank. Python: EPConfigError.
struct DisagreementError : ConfigError {
  using ConfigError::ConfigError;
};

/// An operating-system, CUDA or driver call failed, or memory ran out. Python: EPDeviceError.
struct DeviceError : Error {
  using Error::Error;
};

/// A rank has no memory for what a call brings: known to every rank. Python: EPDeviceError.
struct NoMemoryError : DeviceError {
  using DeviceError::DeviceError;
};

/// What a wait that ran out of time knew. The same record is written by host and device waits.
struct TimeoutRecord {
  int32_t rank = -1;     ///< the rank that waited
  int32_t phase = 0;     ///< what it waited for, see Phase in core/protocol.h
  int32_t peer = -1;     ///< the rank it waited for
  int64_t expected = 0;  ///< value the awaited word should have reached
  int64_t seen = 0;      ///< value it had
};

/// A peer did not arrive in time, died or left. Python: EPTimeoutError.
struct TimeoutError : Error {
  TimeoutError(const std::string& message, const TimeoutRecord& what_was_known)
      : Error(message), record(what_was_known) {}
  TimeoutRecord record;
};

template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  return message.str();
}

}  // namespace ep

/// Checks an argument or a configuration value; the message names the offending values:
///   EP_CHECK(n % k == 0, "num_experts=", n, " is not divisible by num_ranks=", k);
#define EP_CHECK(cond, ...)                                          \
  do {                                                               \
    if (!(cond)) throw ::ep::ConfigError(::ep::concat(__VA_ARGS__)); \
  } while (false)

/// As EP_CHECK, for what all ranks find out together.
#define EP_CHECK_AGREED(cond, ...)                                         \
  do {                                                                     \
    if (!(cond)) throw ::ep::DisagreementError(::ep::concat(__VA_ARGS__)); \
  } while (false)

/// Checks the result of an operating-system call; the message ends with errno's text.
#define EP_CHECK_OS(cond, ...)                                                              \
  do {                                                                                      \
    if (!(cond))                                                                            \
      throw ::ep::DeviceError(                                                              \
          ::ep::concat(__VA_ARGS__, ": ", ::std::strerror(errno), " (errno ", errno, ")")); \
  } while (false)
