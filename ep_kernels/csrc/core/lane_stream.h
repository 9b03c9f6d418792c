#pragma once

#include <cstdint>

#include "core/lane_ring.h"

// Flow control of a ring: what one end may do next, from the words in its own memory. `load(n)`
// reads the word of the slot of piece n: its credit at the sender, its arrival at the receiver.

namespace ep {

/// Pieces of one direction of an exchange, on one channel, towards one peer.
struct LaneStream {
  uint64_t first;    ///< number of the first piece of this exchange
  int64_t total;     ///< its pieces
  int64_t done;      ///< sent, or read
  int64_t credited;  ///< of those sent: read by the peer

  /// Number of the piece that comes next.
  EP_HOST_DEVICE constexpr uint64_t next() const { return first + static_cast<uint64_t>(done); }
};

enum class Readiness { kReady, kWaiting, kFinished };

/// A sender may write piece n when its slot is free. It is through when all is read, so that no
/// exchange leaves puts behind.
template <typename Load>
EP_HOST_DEVICE Readiness look_at_send(LaneStream& stream, int num_slots, const Load& load) {
  if (stream.done < stream.total) {
    const bool is_free = load(stream.next()) >= credit_for(stream.next(), num_slots);
    return is_free ? Readiness::kReady : Readiness::kWaiting;
  }
  while (stream.credited < stream.total) {
    const uint64_t n = stream.first + static_cast<uint64_t>(stream.credited);
    if (load(n) < told_of(n)) return Readiness::kWaiting;
    ++stream.credited;
  }
  return Readiness::kFinished;
}

/// A receiver may read piece n when it has arrived.
template <typename Load>
EP_HOST_DEVICE Readiness look_at_recv(const LaneStream& stream, const Load& load) {
  if (stream.done == stream.total) return Readiness::kFinished;
  return load(stream.next()) >= told_of(stream.next()) ? Readiness::kReady : Readiness::kWaiting;
}

/// A word that did not reach its value.
struct Awaited {
  int64_t expected, seen;
};

/// What a waiting stream waits for.
template <typename Load>
EP_HOST_DEVICE Awaited awaited_by(const LaneStream& stream, bool is_send, int num_slots,
                                  const Load& load) {
  const bool is_through = is_send && stream.done == stream.total;
  const uint64_t n = is_through ? stream.first + static_cast<uint64_t>(stream.credited)  //
                                : stream.next();
  const uint64_t expected = is_send && !is_through ? credit_for(n, num_slots) : told_of(n);
  return {static_cast<int64_t>(expected), static_cast<int64_t>(load(n))};
}

}  // namespace ep
