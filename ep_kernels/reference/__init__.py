"""The specification of ep_kernels in plain PyTorch: clear, not fast.

spec    pure functions over the inputs of all ranks: the oracle of the tests
ll      the same for low-latency mode
Buffer  ep_kernels.Buffer's constructor, methods and results, on top of a process group
"""

from ep_kernels.reference.buffer import Buffer
from ep_kernels.reference.ll import (
    LowLatencyRows,
    fp8_cast,
    low_latency_combine,
    low_latency_dispatch,
)
from ep_kernels.reference.spec import (
    Placement,
    RecvRows,
    combine,
    dispatch,
    get_dispatch_layout,
    make_placement,
    recv_rows,
)

__all__ = [
    "Buffer",
    "LowLatencyRows",
    "Placement",
    "RecvRows",
    "combine",
    "dispatch",
    "fp8_cast",
    "get_dispatch_layout",
    "low_latency_combine",
    "low_latency_dispatch",
    "make_placement",
    "recv_rows",
]
