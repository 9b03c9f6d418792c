"""The specification of ep_kernels in plain PyTorch: clear, not fast.

spec    pure functions over the inputs of all ranks: the oracle of the tests
Buffer  ep_kernels.Buffer's constructor, methods and results, on top of a process group
"""

from ep_kernels.reference.buffer import Buffer
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
    "Placement",
    "RecvRows",
    "combine",
    "dispatch",
    "get_dispatch_layout",
    "make_placement",
    "recv_rows",
]
