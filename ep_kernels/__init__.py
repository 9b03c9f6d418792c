"""Expert-parallel dispatch and combine: rows go where the experts read them, and come back summed.

Buffer           symmetric memory of a group of ranks; dispatch() and combine()
Layout           order of the rows that dispatch delivers
Event            completion of an asynchronous call
remaining_ranks  who goes on when a rank was lost
reference        the same functions in plain PyTorch
"""

from ep_kernels.buffer import Buffer
from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError, EPTimeoutError
from ep_kernels.event import Event
from ep_kernels.handle import CombineResult, DispatchHandle, DispatchLayout, DispatchResult
from ep_kernels.lanes import ScaleoutStats
from ep_kernels.ll_handle import (
    LowLatencyCombineResult,
    LowLatencyDispatchResult,
    LowLatencyHandle,
)
from ep_kernels.remaining import remaining_ranks
from ep_kernels.topology import Topology
from ep_kernels.version import __version__

__all__ = [
    "Buffer",
    "CombineResult",
    "DispatchHandle",
    "DispatchLayout",
    "DispatchResult",
    "EPConfigError",
    "EPDeviceError",
    "EPError",
    "EPTimeoutError",
    "Event",
    "Layout",
    "LowLatencyCombineResult",
    "LowLatencyDispatchResult",
    "LowLatencyHandle",
    "ScaleoutStats",
    "Topology",
    "__version__",
    "remaining_ranks",
]
