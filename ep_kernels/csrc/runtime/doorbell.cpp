#include "runtime/doorbell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace ep {

void ring(Doorbell& doorbell) {
  __atomic_fetch_add(&doorbell.rings, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&doorbell.sleepers, __ATOMIC_SEQ_CST) != 0)
    ::syscall(SYS_futex, &doorbell.rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void sleep_until_rung(Doorbell& doorbell, uint32_t rings, Clock::duration limit) {
  const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(limit).count();
  const timespec timeout{static_cast<time_t>(ns / 1000000000), static_cast<long>(ns % 1000000000)};
  ::syscall(SYS_futex, &doorbell.rings, FUTEX_WAIT, rings, &timeout, nullptr, 0);
}

void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

}  // namespace ep
