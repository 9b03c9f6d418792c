#pragma once

#include <chrono>
#include <cstdint>

#include "core/protocol.h"

namespace ep {

using Clock = std::chrono::steady_clock;

/// Stores a word that a peer may wait for.   Writer: one rank.   Reader: the owner of the word.
/// Order: release; everything stored before is visible to who loads the value with load_flag().
inline void store_flag(uint64_t* flag, uint64_t value) {
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}

/// Order: acquire, pairs with store_flag().
inline uint64_t load_flag(const uint64_t* flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }

/// Rings after stores to the words of the doorbell's owner. Costs a system call only if the owner
/// sleeps.
void ring(Doorbell& doorbell);

/// Sleeps until the doorbell rings after `rings` was read, or for at most `limit`.
void sleep_until_rung(Doorbell& doorbell, uint32_t rings, Clock::duration limit);

/// Lets the core rest for a moment inside a spin.
void spin_pause();

/// Waits for `ready()`: spins briefly, then sleeps in slices so that waiting does not take the
/// core from the rank that is waited for. Between slices it calls `check()`, which throws when
/// waiting has become pointless. Returns false once `deadline` has passed.
template <typename Ready, typename Check>
bool wait_until(Doorbell& doorbell, Clock::time_point deadline, Ready&& ready, Check&& check) {
  constexpr int kNumSpins = 200;
  constexpr auto kSlice = std::chrono::milliseconds(20);
  for (int spin = 0; spin < kNumSpins; ++spin) {
    if (ready()) return true;
    spin_pause();
  }
  while (true) {
    __atomic_fetch_add(&doorbell.sleepers, 1, __ATOMIC_SEQ_CST);
    const uint32_t rings = __atomic_load_n(&doorbell.rings, __ATOMIC_SEQ_CST);
    const bool done = ready();
    if (!done) sleep_until_rung(doorbell, rings, kSlice);
    __atomic_fetch_sub(&doorbell.sleepers, 1, __ATOMIC_SEQ_CST);
    if (done || ready()) return true;
    check();
    if (Clock::now() >= deadline) return false;
  }
}

}  // namespace ep
