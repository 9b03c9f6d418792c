"""What a call over several nodes needs of the place where rows live: NodeRows. Posts, offers and
plans are made on the host wherever that is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from ep_kernels import _native
from ep_kernels._native_lane import lane_library
from ep_kernels.streams import Moment

if TYPE_CHECKING:
    import torch

    from ep_kernels._native import DispatchArgs
    from ep_kernels.backend import CallOptions
    from ep_kernels.bootstrap import Bootstrap
    from ep_kernels.cpu_backend import CpuBackend
    from ep_kernels.handle import RoutingMemory
    from ep_kernels.lanes import Lane
    from ep_kernels.ll_carriers import MakeCarrier
    from ep_kernels.ll_memory import LlMemory
    from ep_kernels.pool import Reservation
    from ep_kernels.transport import Transport


class NodeMemory(Protocol):
    """The pools of a node's ranks; methods as in Backend."""

    @property
    def device(self) -> torch.device: ...
    def choose_num_sms(self, bootstrap: Bootstrap, wanted: int | None) -> int: ...
    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Reservation: ...
    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...
    def memory_pool(self) -> contextlib.AbstractContextManager[None]: ...
    def empty_words(self, num_words: int, *, options: CallOptions) -> torch.Tensor: ...
    def pool_offset(self, tensor: torch.Tensor) -> int | None: ...
    def pool_stats(self) -> dict[str, int]: ...
    def destroy(self) -> None: ...


class NodeRows(Protocol):
    """Rows of a node's ranks, and work on them, which is in order."""

    @property
    def memory(self) -> NodeMemory:
        """The pools."""

    def check_callable(self) -> None:
        """Raises EPConfigError if no call can be made now."""

    def make_transport(self, lane: Lane, bootstrap: Bootstrap) -> Transport:
        """Collective. Raises EPConfigError, EPDeviceError on all ranks."""

    def low_latency_memory(self) -> tuple[LlMemory, MakeCarrier]:
        """As NodeCalls."""

    def caller(self, options: CallOptions) -> Caller:
        """Who makes a call, now."""

    def step(self, name: str, *arguments: Any) -> None:
        """Work on rows: calls a function of the C interface without its prefix."""

    def on_host(
        self, caller: Caller, args: DispatchArgs, memory: RoutingMemory
    ) -> tuple[DispatchArgs, RoutingMemory]:
        """A fresh dispatch with the choices, and memory for the routing, on the host."""

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor, where rows are."""

    def put_routing(self, to: RoutingMemory, of: RoutingMemory) -> None:
        """A routing that was planned on the host."""

    def add(self, to: torch.Tensor, of: torch.Tensor) -> None:
        """Adds, from the host or from where rows are, to a tensor that is where rows are."""

    def new_memory(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 for this work."""

    def begin(self, caller: Caller) -> None:
        """Work from now on comes after the caller's, and after that on memory which is free."""

    def finish(self) -> None:
        """Waits on the host for this work: peers may be told of it. Raises EPDeviceError."""

    def close(self) -> None:
        """Gives memory of its own back."""


class Caller(Protocol):
    """Who makes a call."""

    @property
    def moment(self) -> Moment | None:
        """The call's work comes after it, if there is one."""

    def as_current(self) -> contextlib.AbstractContextManager[Any]:
        """Memory that is freed meanwhile may be in use by the caller's work only."""


class HostCaller:
    """Whose work is done when a call is made."""

    moment = None

    @contextlib.contextmanager
    def as_current(self) -> Iterator[None]:
        yield


class HostRows:
    """Rows in host memory: everything is where the host plans it, and done when it is given."""

    def __init__(self, memory: CpuBackend) -> None:
        self.memory: CpuBackend = memory
        self._library = lane_library()

    def check_callable(self) -> None:
        """Always."""

    def make_transport(self, lane: Lane, bootstrap: Bootstrap) -> Transport:
        from ep_kernels.transport import LaneTransport

        return LaneTransport(lane)

    def low_latency_memory(self) -> tuple[LlMemory, MakeCarrier]:
        from ep_kernels.ll_carriers import LaneCarrier
        from ep_kernels.ll_memory import HostLlMemory

        memory = HostLlMemory()
        return memory, lambda lane, bootstrap: LaneCarrier(lane, memory)

    def caller(self, options: CallOptions) -> Caller:
        return HostCaller()

    def step(self, name: str, *arguments: Any) -> None:
        _native.call(getattr(self._library, f"ep_lane_{name}"), self.memory.core, *arguments)

    def on_host(
        self, caller: Caller, args: DispatchArgs, memory: RoutingMemory
    ) -> tuple[DispatchArgs, RoutingMemory]:
        return args, memory

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def put_routing(self, to: RoutingMemory, of: RoutingMemory) -> None:
        """It is there."""

    def add(self, to: torch.Tensor, of: torch.Tensor) -> None:
        to.add_(of)

    def new_memory(self, num_bytes: int) -> torch.Tensor:
        import torch

        return torch.empty(num_bytes, dtype=torch.uint8)

    def begin(self, caller: Caller) -> None:
        """Nothing is under way."""

    def finish(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """It has none."""
