"""The CUDA backend: device memory that the ranks of a node open, and the compiled CUDA core.

Streams. A buffer has a communication stream. A call makes it wait for the caller's stream (or for
`previous_event`), runs there, and makes the caller's stream wait for it (unless `async_op`).
Temporary tensors are allocated on the communication stream and used only there; results lie in the
pool. Memory of the pool that is freed is written again only after everything that the freeing
stream had been given by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from typing import Any

import torch

from ep_kernels import _native, _native_cuda
from ep_kernels._native import CombineArgs, DispatchArgs
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.config import Settings
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError
from ep_kernels.event import Event
from ep_kernels.handle import DispatchHandle, HostCounts


class _Memory:
    """A range of the pool as torch sees it; returned when the last tensor over it is gone."""

    def __init__(self, backend: CudaBackend, num_bytes: int) -> None:
        self._backend = backend
        self._block, address = backend.allocate_block(num_bytes)
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        self._backend.free_block(self._block)


class _CudaOperation:
    """A call that was put on the communication stream."""

    def __init__(self, backend: CudaBackend, number: int, end: torch.cuda.Event) -> None:
        self._backend, self.number, self.end = backend, number, end

    def is_finished(self) -> bool:
        return self.end.query()

    def wait(self) -> None:
        self.end.synchronize()
        self._backend.check(self.number)

    def make_current_stream_wait(self) -> None:
        torch.cuda.current_stream(self._backend.device).wait_event(self.end)


class CudaBackend:
    """One rank's end of the memory on the GPUs of a node.

    Raises:
        EPDeviceError: the CUDA core is not built, or memory cannot be taken or mapped.
    """

    def __init__(self, bootstrap: Bootstrap, settings: Settings) -> None:
        self.device = torch.device(settings.device)
        self._pid = os.getpid()
        self._pool_base, self._pool_bytes = 0, settings.pool_bytes
        self._pending: list[tuple[_CudaOperation, Any]] = []
        self._captured: list[Any] = []  # memory that a graph will use again
        self._freed: dict[int, torch.cuda.Event] = {}  # stream -> what it had when it freed memory
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
        self.stream = torch.cuda.Stream(self.device)
        block, address = self.allocate_block(1)  # any block tells where the pool begins
        self._pool_base = address - self._block_offset
        self._library.ep_cuda_block_free(block)

    def _create(self, bootstrap: Bootstrap, settings: Settings, handle: Any) -> None:
        experts = (ctypes.c_int32 * settings.num_experts)(*settings.expert_to_rank)
        torch.zeros(1, device=self.device)  # torch makes the device's context its own way
        config = _native_cuda.CudaConfig(
            device=self.device.index,
            rank=bootstrap.rank,
            num_ranks=bootstrap.num_ranks,
            num_experts=settings.num_experts,
            expert_rank=ctypes.addressof(experts),
            pool_bytes=settings.pool_bytes,
            timeout_us=int(settings.timeout_s * 1e6),
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

    def allocate_block(self, num_bytes: int) -> tuple[int, int]:
        """A range of the pool: (handle of the block, address)."""
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
        self._block_offset = offset.value
        return block.value, address.value or 0

    def free_block(self, block: int) -> None:
        """Called when a tensor dies: its stream may still have work on the memory."""
        with contextlib.suppress(RuntimeError):  # the context may be gone at exit
            stream = torch.cuda.current_stream(self.device)
            if self._buffer is not None and not torch.cuda.is_current_stream_capturing():
                event = self._freed.setdefault(stream.cuda_stream, torch.cuda.Event())
                event.record(stream)
        self._library.ep_cuda_block_free(block)

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

    # Calls

    @contextlib.contextmanager
    def call(self, previous_event: Event | None) -> Iterator[None]:
        """A call's work goes to the communication stream, after what it has to wait for."""
        self._poll()
        if previous_event is None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        elif isinstance(previous_event.operation, _CudaOperation):
            self.stream.wait_event(previous_event.operation.end)
        else:
            previous_event.wait()
        if previous_event is not None:
            for event in self._freed.values():
                self.stream.wait_event(event)
        self._caller = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            yield

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

    def notify(self, args: DispatchArgs, handle: DispatchHandle) -> tuple[int, HostCounts]:
        """Exchanges counts and fills the routing; the host waits for the sizes."""
        call = ctypes.c_int64()
        scratch = self._scratch(args)
        _native.call(
            self._library.ep_cuda_notify,
            self._buffer,
            ctypes.byref(args),
            scratch.data_ptr(),
            self.stream.cuda_stream,
            ctypes.byref(call),
        )
        self._call = call.value
        sizes = (ctypes.c_int64 * 3)()
        counts = torch.zeros(self._num_local_experts, dtype=torch.int64)
        offsets = torch.zeros(self._num_local_experts + 1, dtype=torch.int64)
        _native.call(
            self._library.ep_cuda_wait_sizes,
            self._buffer,
            call.value,
            self.stream.cuda_stream,
            sizes,
            counts.data_ptr(),
            offsets.data_ptr(),
        )
        host = HostCounts(
            num_rows=sizes[0], num_recv_tokens_per_expert=counts, expert_offsets=offsets
        )
        return call.value, host

    def send(self, seq: int, args: DispatchArgs, *, keep: Any, error: str, async_op: bool) -> Event:
        _native.call(
            self._library.ep_cuda_send,
            self._buffer,
            self._call,
            ctypes.byref(args),
            not error,
            self.stream.cuda_stream,
        )
        return self._event(self._call, keep, async_op)

    def dispatch(self, args: DispatchArgs, *, keep: Any, async_op: bool) -> tuple[int, Event]:
        """A dispatch whose memory is known beforehand; returns its number and its event."""
        call = ctypes.c_int64()
        scratch = self._scratch(args) if args.sizes.handle_seq < 0 else None
        _native.call(
            self._library.ep_cuda_dispatch,
            self._buffer,
            ctypes.byref(args),
            None if scratch is None else scratch.data_ptr(),
            self.stream.cuda_stream,
            ctypes.byref(call),
        )
        return call.value, self._event(call.value, (keep, scratch), async_op)

    def combine(self, args: CombineArgs, *, keep: Any, async_op: bool) -> Event:
        call = ctypes.c_int64()
        _native.call(
            self._library.ep_cuda_combine,
            self._buffer,
            ctypes.byref(args),
            self.stream.cuda_stream,
            ctypes.byref(call),
        )
        return self._event(call.value, keep, async_op)

    def barrier(self) -> None:
        """Waits on the host, too."""
        call = ctypes.c_int64()
        _native.call(
            self._library.ep_cuda_barrier,
            self._buffer,
            self.stream.cuda_stream,
            ctypes.byref(call),
        )
        self.stream.synchronize()
        self.check(call.value)

    def refuse(self, reason: str) -> None:
        call = ctypes.c_int64()
        _native.call(
            self._library.ep_cuda_refuse,
            self._buffer,
            reason.encode(),
            self.stream.cuda_stream,
            ctypes.byref(call),
        )

    def check(self, number: int) -> bool:
        """Raises the error of a call; False while it runs."""
        is_finished = ctypes.c_int32()
        _native.call(self._library.ep_cuda_check, self._buffer, number, ctypes.byref(is_finished))
        return bool(is_finished.value)

    def _scratch(self, args: DispatchArgs) -> torch.Tensor:
        count = self._library.ep_cuda_scratch_elements(self._buffer, args.sizes.num_tokens)
        return torch.empty(count, dtype=torch.int32, device=self.device)

    def _event(self, number: int, keep: Any, async_op: bool) -> Event:
        end = torch.cuda.Event()
        end.record(self.stream)
        operation = _CudaOperation(self, number, end)
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(keep)
        else:
            self._pending.append((operation, keep))
        if not async_op:
            self._caller.wait_event(end)
        return Event(operation)

    def _poll(self) -> None:
        """Lets go of finished calls. One that failed makes this call fail, on every rank.

        Errors that a kernel finds surface at event.wait(), or here.
        """
        if torch.cuda.is_current_stream_capturing():
            return
        while self._pending and self._pending[0][0].is_finished():
            operation, _ = self._pending.pop(0)
            try:
                self.check(operation.number)
            except EPConfigError as error:
                self.refuse(f"an earlier call failed: {error}")
                raise

    # End

    def destroy(self) -> None:
        """Waits for the device and leaves the group; results stay valid. Idempotent."""
        if self._buffer is None or self._pid != os.getpid():
            return
        buffer, self._buffer = self._buffer, None
        self._pending.clear()
        self._captured.clear()
        _native.call(self._library.ep_cuda_buffer_destroy, buffer)
        self._library.ep_cuda_buffer_delete(buffer)
