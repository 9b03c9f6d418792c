#pragma once

#include <cstdint>

namespace ep::nvshmem {

constexpr int kUniqueIdBytes = 128;

/// A number that the PEs of a world need to find each other; made by one of them.
void make_unique_id(uint8_t (&id)[kUniqueIdBytes]);

/// Joins `num_pes` processes; once per process. Collective.
///
/// NOTE: NVSHMEM ends the process if it cannot begin; what can be found out before is checked.
void join_world(int device, int pe, int num_pes, const uint8_t (&id)[kUniqueIdBytes]);

/// Collective.
void leave_world();

/// Of the NVSHMEM that was found at run time.
void find_version(int (&version)[3]);

}  // namespace ep::nvshmem
