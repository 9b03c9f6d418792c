"""The CUDA backend: device memory that the ranks of a node open, and the compiled CUDA core.

Streams. A buffer has a communication stream. A call makes it wait for the caller's stream (or for
`previous_event`), runs there, and makes the caller's stream wait for it (unless `async_op`).
Results lie in the pool. Memory of the pool that is freed is written again only after everything
that the stream which freed it had been given by then.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from typing import Any

import torch

from ep_kernels import _native, _native_cuda
from ep_kernels._native import CombineArgs, DispatchArgs
from ep_kernels._native_cuda import CallOrder
from ep_kernels.backend import CallOptions
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.config import Settings
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError
from ep_kernels.event import Event
from ep_kernels.handle import HostCounts, RoutingMemory
from ep_kernels.lanes import ScaleoutStats


class _Memory:
    """A range of the pool as torch sees it; returned when the last tensor over it is gone."""

    def __init__(self, backend: CudaBackend, num_bytes: int) -> None:
        self._backend = backend
        self._block, address, _ = backend.allocate_block(num_bytes)
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        if hasattr(self, "_block"):
            self._backend.free_block(self._block)


class CudaOperation:
    """A call that was put on the communication stream."""

    def __init__(self, backend: CudaBackend, number: int) -> None:
        self.backend, self.number = backend, number

    def is_finished(self) -> bool:
        return self.backend.is_finished(self.number)

    def wait(self) -> None:
        self.backend.wait(self.number)

    def make_current_stream_wait(self) -> None:
        self.backend.make_current_stream_wait(self.number)

    def interval(self) -> None:
        return None


class CudaBackend:
    """One rank's end of the memory on the GPUs of a node.

    Raises:
        EPDeviceError: the CUDA core is not built, or memory cannot be taken or mapped.
    """

    def __init__(self, bootstrap: Bootstrap, settings: Settings) -> None:
        self.device = torch.device(settings.device)
        self._pid = os.getpid()
        self._pool_base, self._pool_bytes = 0, settings.total_pool_bytes
        self._when_destroyed: list[Callable[[], None]] = []
        self._pending: list[tuple[int, Any]] = []  # call, what it uses
        self._captured: list[Any] = []  # memory that a graph will use again
        self._buffer: int | None = None
        table = torch.tensor(settings.expert_to_rank, device=self.device)
        self._expert_to_rank = table
        self._experts_of_rank = [
            (table == rank).nonzero().flatten() for rank in range(bootstrap.num_ranks)
        ]
        self._num_local_experts = settings.expert_to_rank.count(bootstrap.rank)
        problem: EPError | None = None
        handle = (ctypes.c_uint8 * _native_cuda.HANDLE_BYTES)()
        try:
            self._library = _native_cuda.cuda_library()
            self._create(bootstrap, settings, handle)
        except EPError as error:
            problem = error
        self._attach(bootstrap, bytes(handle), problem)
        block, address, offset = self.allocate_block(1)  # any block tells where the pool begins
        self._pool_base = address - offset
        self.free_block(block)

    def _create(self, bootstrap: Bootstrap, settings: Settings, handle: Any) -> None:
        experts = (ctypes.c_int32 * settings.num_experts)(*settings.expert_to_rank)
        torch.zeros(1, device=self.device)  # torch makes the device's context its own way
        config = _native_cuda.CudaConfig(
            device=self.device.index,
            rank=bootstrap.rank,
            num_ranks=bootstrap.num_ranks,
            num_experts=settings.num_experts,
            expert_rank=ctypes.addressof(experts),
            pool_bytes=settings.total_pool_bytes,
            timeout_us=int(settings.timeout_s * 1e6),
            low_latency_bytes=settings.low_latency_bytes,
        )
        out = ctypes.c_void_p()
        _native.call(
            self._library.ep_cuda_buffer_create, ctypes.byref(config), ctypes.byref(out), handle
        )
        self._buffer = out.value

    def _attach(self, bootstrap: Bootstrap, handle: bytes, problem: EPError | None) -> None:
        """Maps the peers' memory; fails on all ranks if it fails on one."""
        peers = bootstrap.all_gather((handle, str(problem or "")))
        try:
            for rank, (_, message) in enumerate(peers):
                if message:
                    raise EPDeviceError(f"rank {rank} has no device memory: {message}")
            handles = b"".join(peer[0] for peer in peers)
            _native.call(self._library.ep_cuda_buffer_attach, self._buffer, handles)
        except EPError as error:
            problem = error
        for rank, message in enumerate(bootstrap.all_gather(str(problem or ""))):
            if message and problem is None:
                problem = EPDeviceError(f"rank {rank} could not map its peers: {message}")
        if problem is not None:
            self.destroy()
            raise problem

    # Memory

    def allocate_block(self, num_bytes: int) -> tuple[int, int, int]:
        """A range of the pool: (handle of the block, address, offset)."""
        block, address, offset = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int64()
        _native.call(
            self._library.ep_cuda_block_allocate,
            self._buffer,
            num_bytes,
            ctypes.byref(block),
            ctypes.byref(address),
            ctypes.byref(offset),
        )
        assert block.value is not None
        return block.value, address.value or 0, offset.value

    def free_block(self, block: int) -> None:
        """Called when a tensor dies: the current stream may still have work on the memory."""
        stream = self._current_stream() if self._buffer is not None else 0
        self._library.ep_cuda_block_free(self._buffer, block, stream)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in this rank's pool. Raises EPDeviceError if the pool is full."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        memory = _Memory(self, num_bytes)
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(memory)
        return torch.as_tensor(memory, device=self.device).view(dtype).view(shape)

    def pool_offset(self, tensor: torch.Tensor) -> int | None:
        """Offset of a contiguous tensor in the pool, None if it lies elsewhere."""
        offset = tensor.data_ptr() - self._pool_base
        return offset if 0 <= offset < self._pool_bytes and tensor.numel() > 0 else None

    def pool_stats(self) -> dict[str, int]:
        stats = (ctypes.c_int64 * 3)()
        self._library.ep_cuda_pool_stats(self._buffer, stats)
        return {"num_live": stats[0], "used_bytes": stats[1], "peak_bytes": stats[2]}

    def scaleout_stats(self) -> ScaleoutStats:
        return ScaleoutStats()

    # Calls

    def poll(self) -> None:
        """Lets go of finished calls. One that failed makes this call fail, on every rank.

        Errors that a kernel finds surface at event.wait(), or here.
        """
        while self._pending and self.is_finished(self._pending[0][0]):
            number, _ = self._pending.pop(0)
            try:
                _native.call(self._library.ep_cuda_check, self._buffer, number)
            except EPConfigError as error:
                self.refuse(f"an earlier call failed: {error}")
                raise

    def count_rows(self, topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts as of the CPU backend; the caller's stream is used. Indices are not checked."""
        num_tokens, num_experts = topk_idx.shape[0], self._expert_to_rank.numel()
        columns = torch.where(topk_idx < 0, num_experts, topk_idx)
        is_chosen = torch.zeros(
            (num_tokens, num_experts + 1), dtype=torch.bool, device=self.device
        ).scatter_(1, columns, True)[:, :num_experts]
        is_in_rank = torch.stack(
            [is_chosen[:, experts].any(dim=1) for experts in self._experts_of_rank], dim=1
        )
        counts = torch.cat([is_in_rank.sum(0), is_chosen.sum(0)]).to(torch.int32)
        return counts, is_in_rank

    def notify(
        self, args: DispatchArgs, memory: RoutingMemory, *, options: CallOptions
    ) -> tuple[int, HostCounts]:
        """Exchanges counts and fills the routing; the host waits for the sizes."""
        number, sizes = ctypes.c_int64(), (ctypes.c_int64 * 3)()
        counts = torch.empty(self._num_local_experts, dtype=torch.int64)
        offsets = torch.empty(self._num_local_experts + 1, dtype=torch.int64)
        _native.call(
            self._library.ep_cuda_notify,
            self._buffer,
            ctypes.byref(args),
            ctypes.byref(self._order(options)),
            ctypes.byref(number),
            sizes,
            counts.data_ptr(),
            offsets.data_ptr(),
        )
        return number.value, HostCounts(
            num_rows=sizes[0], num_recv_tokens_per_expert=counts, expert_offsets=offsets
        )

    def send(
        self,
        seq: int,
        args: DispatchArgs,
        memory: RoutingMemory,
        *,
        keep: Any,
        error: str,
        options: CallOptions,
    ) -> Event:
        _native.call(
            self._library.ep_cuda_send,
            self._buffer,
            seq,
            ctypes.byref(args),
            not error,
            ctypes.byref(self._order(options)),
        )
        return self._event(seq, keep)

    def dispatch(
        self, args: DispatchArgs, memory: RoutingMemory, *, keep: Any, options: CallOptions
    ) -> tuple[int, Event]:
        """A dispatch whose memory is known beforehand; returns its number and its event."""
        number = self._start(self._library.ep_cuda_dispatch, args, options)
        return number, self._event(number, keep)

    def combine(
        self, args: CombineArgs, memory: RoutingMemory, *, keep: Any, options: CallOptions
    ) -> Event:
        return self._event(self._start(self._library.ep_cuda_combine, args, options), keep)

    def barrier(self) -> None:
        """Waits on the host, too."""
        number = ctypes.c_int64()
        _native.call(
            self._library.ep_cuda_barrier,
            self._buffer,
            ctypes.byref(self._order(None)),
            ctypes.byref(number),
        )
        self.wait(number.value)

    def refuse(self, reason: str) -> None:
        _native.call(
            self._library.ep_cuda_refuse,
            self._buffer,
            reason.encode(),
            ctypes.byref(self._order(None)),
            ctypes.byref(ctypes.c_int64()),
        )

    # Calls under way

    def is_finished(self, number: int) -> bool:
        return self._buffer is None or bool(self._library.ep_cuda_is_finished(self._buffer, number))

    def wait(self, number: int) -> None:
        if self._buffer is None:
            return
        try:
            _native.call(self._library.ep_cuda_wait, self._buffer, number)
        finally:  # whoever waited knows the outcome; poll() need not tell it again
            self._pending = [entry for entry in self._pending if entry[0] != number]

    def make_current_stream_wait(self, number: int) -> None:
        if self._buffer is not None:
            _native.call(
                self._library.ep_cuda_make_stream_wait,
                self._buffer,
                number,
                self._current_stream(),
            )

    def finish_calls(self) -> None:
        """Waits on the host for all calls under way."""
        for number, _ in list(self._pending):
            self.wait(number)

    def end_event(self, number: int) -> int | None:
        """The cudaEvent_t at the end of a call."""
        return self._library.ep_cuda_end_event(self._buffer, number)

    def _current_stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def _order(self, options: CallOptions | None) -> CallOrder:
        order = CallOrder(caller=self._current_stream())
        if options is None:
            return order
        order.is_async = options.async_op
        previous = options.previous_event
        operation = None if previous is None else previous.operation
        if isinstance(operation, CudaOperation) and not operation.is_finished():
            order.previous = operation.backend.end_event(operation.number)
        elif previous is not None:
            previous.wait()
        return order

    def _start(self, function: Any, args: Any, options: CallOptions) -> int:
        number = ctypes.c_int64()
        order = self._order(options)
        _native.call(
            function, self._buffer, ctypes.byref(args), ctypes.byref(order), ctypes.byref(number)
        )
        return number.value

    def _event(self, number: int, keep: Any) -> Event:
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(keep)
        else:
            self._pending.append((number, keep))
        return Event(CudaOperation(self, number))

    # End

    @property
    def core(self) -> int | None:
        """The compiled buffer; None after destroy()."""
        return self._buffer

    def when_destroyed(self, function: Callable[[], None]) -> None:
        """Calls `function` once the device is idle, before the compiled buffer is gone."""
        self._when_destroyed.append(function)

    def destroy(self) -> None:
        """Waits for the device and leaves the group; results stay valid. Idempotent."""
        if self._buffer is None or self._pid != os.getpid():
            return
        buffer, self._buffer = self._buffer, None
        self._pending.clear()
        self._captured.clear()
        _native.call(self._library.ep_cuda_buffer_destroy, buffer)
        while self._when_destroyed:
            self._when_destroyed.pop()()
        self._library.ep_cuda_buffer_delete(buffer)
