"""Rows in device memory: what a call over several nodes does with them (node_rows.py).

Calls are planned on the host, so the choices of a fresh dispatch come to the host, and its routing
goes to the device. Work on rows is in order on one stream. Before a rank tells others that
something is so (memory is free, rows are here, rows were read), the host has waited for the work
that makes it so: words in host memory and data in device memory need no other order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from ep_kernels._native import DispatchArgs, Routing
from ep_kernels.errors import EPConfigError
from ep_kernels.handle import RoutingMemory
from ep_kernels.streams import Moment, Stream

if TYPE_CHECKING:
    import torch

    from ep_kernels.backend import CallOptions
    from ep_kernels.bootstrap import Bootstrap
    from ep_kernels.lanes import Lane
    from ep_kernels.ll_carriers import MakeCarrier
    from ep_kernels.ll_memory import LlMemory
    from ep_kernels.node_rows import Caller, NodeMemory
    from ep_kernels.transport import Transport


class Device(Protocol):
    """A device and its memory; cuda_nodes.py has that of CUDA."""

    @property
    def memory(self) -> NodeMemory:
        """The pools of the node's ranks."""

    @property
    def rows(self) -> Stream:
        """The stream of the work on rows."""

    def is_capturing(self) -> bool:
        """Whether the caller's stream takes part in a CUDA graph."""

    def current_stream(self) -> Stream:
        """That of the caller."""

    def as_current(self, stream: Stream) -> contextlib.AbstractContextManager[Any]:
        """Makes it the current stream of this thread."""

    def new_stream(self) -> Stream: ...

    def new_memory(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 on the device, for work on rows."""

    def step(self, name: str, *arguments: Any) -> None:
        """Work on rows."""

    def copy_to_host(self, to: torch.Tensor, address: int, stream: Stream) -> None:
        """Fills `to` from device memory, without waiting."""

    def wait_for_freed(self) -> None:
        """Work on rows from now on comes after that on memory of the pool which is free."""

    def make_transport(self, lane: Lane, bootstrap: Bootstrap) -> Transport: ...

    def low_latency_memory(self) -> tuple[LlMemory, MakeCarrier]: ...

    def close(self) -> None: ...


class DeviceCaller:
    """Who makes a call, from a stream.

    Args:
        device: of the stream.
        is_followed: the call comes after the work that the stream was given by now.
    """

    def __init__(self, device: Device, *, is_followed: bool) -> None:
        self._device, self._stream = device, device.current_stream()
        self.moment: Moment | None = self._stream.record() if is_followed else None

    @contextlib.contextmanager
    def as_current(self) -> Iterator[None]:
        with self._device.as_current(self._stream):
            yield


class DeviceRows:
    """See above and NodeRows."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._inputs = device.new_stream()  # what the host reads before a call begins

    @property
    def memory(self) -> NodeMemory:
        return self._device.memory

    def check_callable(self) -> None:
        if self._device.is_capturing():
            raise EPConfigError(
                "a call over several nodes cannot be captured in a CUDA graph: the host has a part"
            )

    def make_transport(self, lane: Lane, bootstrap: Bootstrap) -> Transport:
        return self._device.make_transport(lane, bootstrap)

    def low_latency_memory(self) -> tuple[LlMemory, MakeCarrier]:
        return self._device.low_latency_memory()

    def caller(self, options: CallOptions) -> Caller:
        return DeviceCaller(self._device, is_followed=options.previous_event is None)

    def step(self, name: str, *arguments: Any) -> None:
        self._device.step(name, *arguments)

    def on_host(
        self, caller: Caller, args: DispatchArgs, memory: RoutingMemory
    ) -> tuple[DispatchArgs, RoutingMemory]:
        """Waits on the host for the caller, who makes the choices."""
        import torch

        num_words, num_choices = memory.words.numel(), memory.num_tokens * memory.num_topk
        both = self._inputs.host_memory(8 * (num_words + num_choices)).view(torch.int64)
        words, topk_idx = both[:num_words], both[num_words:]
        if num_choices:
            if caller.moment is not None:
                self._inputs.wait(caller.moment)
            self._device.copy_to_host(topk_idx, args.routing.topk_idx, self._inputs)
            self._inputs.synchronize()
        host_memory = replace(memory, words=words)
        on_host = DispatchArgs.from_buffer_copy(args)
        on_host.routing = Routing(topk_idx=topk_idx.data_ptr(), **host_memory.addresses())
        return on_host, host_memory

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        there = self.new_memory(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        self._device.rows.copy(there, tensor)
        return there

    def put_routing(self, to: RoutingMemory, of: RoutingMemory) -> None:
        self._device.rows.copy(to.words, of.words)

    def add(self, to: torch.Tensor, of: torch.Tensor) -> None:
        self._device.rows.add(to, of)

    def new_memory(self, num_bytes: int) -> torch.Tensor:
        return self._device.new_memory(num_bytes)

    def begin(self, caller: Caller) -> None:
        if caller.moment is not None:
            self._device.rows.wait(caller.moment)
        self._device.wait_for_freed()

    def finish(self) -> None:
        self._device.rows.synchronize()

    def close(self) -> None:
        self._device.close()
