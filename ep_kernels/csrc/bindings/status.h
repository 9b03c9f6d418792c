#pragma once

#include <stdint.h>

#include <cstring>
#include <exception>

#include "core/check.h"

// How functions of the C interfaces report errors.

#define EP_API extern "C" __attribute__((visibility("default")))

enum EpStatus : int32_t {
  kEpOk = 0,
  kEpConfigError = 1,   ///< refused on this rank, before anything was sent
  kEpPeerError = 2,     ///< refused by a peer, or ranks disagree
  kEpDeviceError = 3,   ///< memory, operating system, CUDA
  kEpTimeoutError = 4,  ///< a peer is silent, dead or gone
  kEpUnknownError = 5,
};

struct EpError {
  char message[1024];
  int32_t rank, phase, peer;
  int64_t expected, seen;
};

namespace ep {

inline int32_t report(EpError* error, EpStatus status, const char* message,
                      const ep::TimeoutRecord& record = {}) {
  if (error == nullptr) return status;
  std::strncpy(error->message, message, sizeof(error->message) - 1);
  error->message[sizeof(error->message) - 1] = '\0';
  error->rank = record.rank;
  error->phase = record.phase;
  error->peer = record.peer;
  error->expected = record.expected;
  error->seen = record.seen;
  return status;
}

/// Runs `body` and turns what it throws into a status.
template <typename Body>
int32_t guarded(EpError* error, Body&& body) {
  try {
    body();
    return kEpOk;
  } catch (const ep::TimeoutError& e) {
    return report(error, kEpTimeoutError, e.what(), e.record);
  } catch (const ep::DisagreementError& e) {
    return report(error, kEpPeerError, e.what());
  } catch (const ep::ConfigError& e) {
    return report(error, kEpConfigError, e.what());
  } catch (const ep::DeviceError& e) {
    return report(error, kEpDeviceError, e.what());
  } catch (const std::exception& e) {
    return report(error, kEpUnknownError, e.what());
  }
}

}  // namespace ep
