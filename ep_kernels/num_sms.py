"""How many SMs a transfer takes, from what was measured when the buffer was made.

One SM moves rows at a rate of its own; the memory that ranks share, or the link between their GPUs,
at another. SMs beyond the quotient add nothing and are taken from GEMMs. No table of machines is
needed: both rates are measured by copies from each rank's pool to the next rank's, by all ranks at
once, which go over the link where there is one and over shared memory where there is none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

MARGIN = 1.5
"""SMs are not equally fast, and rows go to several places: with as many SMs as the rates of an SM
and of the memory ask for, 8, dispatch took 1.15 times as long as with 16 at EP8 on one H200
(docs/performance.md)."""

DEFAULT = 16
"""For pools too small to measure with."""

COPY_BYTES = 32 << 20
ONE_SM_COPY_BYTES = 2 << 20
COPY_UNIT = 4 << 10
"""As in `csrc/cuda/kernels.h`."""

MIN_COPY_BYTES = 256 << 10
NUM_COPIES = 3


def measure_num_sms(
    copy_rate: Callable[[int, int], float], *, pool_bytes: int, max_num_sms: int
) -> int:
    """The number of SMs for one rank, between 1 and `max_num_sms`. Collective.

    Args:
        copy_rate: (num_sms, num_bytes) -> bytes per second of a copy by this rank while all others
            make it, too.
        pool_bytes: free memory of the pool. A copy uses at most half of it.
        max_num_sms: SMs of the device over the ranks on it.
    """
    limit = pool_bytes // 4 // COPY_UNIT * COPY_UNIT  # source and destination
    if limit < MIN_COPY_BYTES:
        return min(DEFAULT, max_num_sms)
    of_all = _median_rate(copy_rate, max_num_sms, min(COPY_BYTES, limit))
    of_one = _median_rate(copy_rate, 1, min(ONE_SM_COPY_BYTES, limit))
    return num_sms_for(of_all, of_one, max_num_sms=max_num_sms)


def num_sms_for(rate_of_all: float, rate_of_one: float, *, max_num_sms: int) -> int:
    """SMs that together reach `rate_of_all`, with a margin."""
    return max(1, min(max_num_sms, math.ceil(MARGIN * rate_of_all / rate_of_one)))


def _median_rate(copy_rate: Callable[[int, int], float], num_sms: int, num_bytes: int) -> float:
    copy_rate(num_sms, num_bytes)  # touches the memory
    return statistics.median(copy_rate(num_sms, num_bytes) for _ in range(NUM_COPIES))
