"""The CPU backend: POSIX shared memory, and the compiled core behind its C interface."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ep_kernels import _native, env
from ep_kernels._native import CombineArgs, DispatchArgs
from ep_kernels.backend import CallOptions, FreshDispatch, wait_for_previous
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.config import Settings
from ep_kernels.errors import EPDeviceError, EPError
from ep_kernels.event import Event
from ep_kernels.handle import HostCounts, RoutingMemory
from ep_kernels.lanes import ScaleoutStats
from ep_kernels.pool import ReceiveFormat, Reservation, point_to, reserve_rows
from ep_kernels.topology import Topology


class _Block:
    """A range of the pool; returned when the last tensor over it is gone."""

    def __init__(self, library: Any, block: int) -> None:
        self._free, self._block = library.ep_block_free, block

    def __del__(self) -> None:
        self._free(self._block)


class _CpuOperation:
    """A call under way, or done, on the buffer's queue."""

    def __init__(self, library: Any, op: int) -> None:
        self._library, self._op = library, op

    def is_finished(self) -> bool:
        return bool(self._library.ep_op_is_finished(self._op))

    def wait(self) -> None:
        _native.call(self._library.ep_op_wait, self._op)

    make_current_stream_wait = wait

    def interval(self) -> tuple[int, int]:
        times = (ctypes.c_int64 * 2)()
        self._library.ep_op_interval(self._op, times)
        return times[0], times[1]

    def __del__(self) -> None:
        self._library.ep_op_release(self._op)


def tensor_at(
    address: int, shape: tuple[int, ...], dtype: torch.dtype, *, keep: Any = None
) -> torch.Tensor:
    """A tensor over memory that lives as long as `keep` does."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    memory.keep = keep  # type: ignore[attr-defined]  # lives as long as the tensor
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


class CpuBackend:
    """One rank's end of the memory that the ranks of a node share.

    Raises:
        EPDeviceError: shared memory cannot be made or mapped.
    """

    device = torch.device("cpu")
    chains_rows = False

    def __init__(self, bootstrap: Bootstrap, settings: Settings, topology: Topology) -> None:
        self._pid = os.getpid()
        self._pool_base = 0
        self._pool_bytes = settings.total_pool_bytes
        self._when_destroyed: list[Callable[[], None]] = []
        self._pending: list[tuple[_CpuOperation, Any]] = []
        self._buffer: int | None = None
        self._num_local_ranks = topology.num_local_ranks
        self._num_ranks, self._num_experts = bootstrap.num_ranks, settings.num_experts
        problem: EPError | None = None
        fd = ctypes.c_int32(-1)
        try:
            self._create(topology, settings, fd)
        except EPError as error:
            problem = error
        self._attach(bootstrap, topology, fd.value, problem)
        _, address, offset = self._allocate(1)  # any block tells where the pool begins
        self._pool_base = address - offset

    def _create(self, topology: Topology, settings: Settings, fd: ctypes.c_int32) -> None:
        self._library = _native.cpu_library()
        experts = (ctypes.c_int32 * settings.num_experts)(*settings.expert_to_rank)
        config = _native.Config(
            rank=topology.rank,
            num_ranks=topology.num_ranks,
            num_experts=settings.num_experts,
            num_local_ranks=topology.num_local_ranks,
            expert_rank=ctypes.addressof(experts),
            pool_bytes=self._pool_bytes,
            timeout_us=int(settings.timeout_s * 1e6),
        )
        out = ctypes.c_void_p()
        _native.call(
            self._library.ep_buffer_create,
            ctypes.byref(config),
            ctypes.byref(out),
            ctypes.byref(fd),
        )
        self._buffer = out.value

    def _attach(
        self, bootstrap: Bootstrap, topology: Topology, fd: int, problem: EPError | None
    ) -> None:
        """Maps the memory of the node's ranks; fails on all ranks if it fails on one."""
        peers = bootstrap.all_gather((self._pid, fd, str(problem or "")))
        try:
            for rank, (_, _, message) in enumerate(peers):
                if message:
                    raise EPDeviceError(f"rank {rank} has no shared memory: {message}")
            local = [peers[rank] for rank in topology.local_ranks]
            pids = (ctypes.c_int64 * len(local))(*(pid for pid, _, _ in local))
            fds = (ctypes.c_int32 * len(local))(*(fd for _, fd, _ in local))
            _native.call(self._library.ep_buffer_attach, self._buffer, pids, fds)
        except EPError as error:
            problem = error
        outcomes = bootstrap.all_gather(str(problem or ""))
        if problem is None:
            for rank, message in enumerate(outcomes):
                if message:
                    problem = EPDeviceError(f"rank {rank} could not map its peers: {message}")
                    break
        if problem is not None:
            self.destroy()
            raise problem
        self._library.ep_buffer_close_files(self._buffer)

    # Memory

    def _allocate(self, num_bytes: int) -> tuple[_Block, int, int]:
        block, address, offset = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int64()
        _native.call(
            self._library.ep_block_allocate,
            self._buffer,
            num_bytes,
            ctypes.byref(block),
            ctypes.byref(address),
            ctypes.byref(offset),
        )
        assert block.value is not None
        return _Block(self._library, block.value), address.value or 0, offset.value

    def choose_num_sms(self, bootstrap: Bootstrap, wanted: int | None) -> int:
        """Worker threads of this rank's transfers."""
        return wanted or env.default_num_threads(self._num_local_ranks)

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Reservation:
        """Memory of this rank's pool for a tensor. Raises EPDeviceError if the pool is full."""
        num_bytes = math.prod(shape) * dtype.itemsize
        block, address, offset = self._allocate(num_bytes) if num_bytes else (None, 0, 0)
        return Reservation(
            offset=offset,
            address=address,
            tensor=lambda: tensor_at(address, shape, dtype, keep=block),
        )

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in this rank's pool."""
        return self.reserve(shape, dtype).tensor()

    def memory_pool(self) -> AbstractContextManager[None]:
        """Nothing: torch's allocator of host memory cannot be replaced for a while."""
        return nullcontext()

    def empty_words(self, num_words: int, *, options: CallOptions) -> torch.Tensor:
        """Ordinary memory."""
        return torch.empty(num_words, dtype=torch.int64)

    def view(
        self, offset: int, shape: tuple[int, ...], dtype: torch.dtype, *, keep: Any
    ) -> torch.Tensor:
        """A tensor at an offset of the pool; `keep`, a tensor in the pool, lives as long."""
        return tensor_at(self._pool_base + offset, shape, dtype, keep=keep)

    def pool_offset(self, tensor: torch.Tensor) -> int | None:
        """Offset of a contiguous tensor in the pool, None if it lies elsewhere."""
        offset = tensor.data_ptr() - self._pool_base
        return offset if 0 <= offset < self._pool_bytes and tensor.numel() > 0 else None

    def pool_stats(self) -> dict[str, int]:
        stats = (ctypes.c_int64 * 3)()
        self._library.ep_pool_stats(self._buffer, stats)
        return {"num_live": stats[0], "used_bytes": stats[1], "peak_bytes": stats[2]}

    def scaleout_stats(self) -> ScaleoutStats:
        return ScaleoutStats()

    # Calls

    def poll(self) -> None:
        self._pending = [entry for entry in self._pending if not entry[0].is_finished()]

    def count_rows(self, topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows for each rank, then tokens for each expert [R + E] int32; [T, R] bool."""
        counts = torch.zeros(self._num_ranks + self._num_experts, dtype=torch.int32)
        is_token_in_rank = torch.zeros((topk_idx.shape[0], self._num_ranks), dtype=torch.bool)
        _native.call(
            self._library.ep_count_rows,
            self._buffer,
            topk_idx.data_ptr(),
            topk_idx.shape[0],
            topk_idx.shape[1],
            counts.data_ptr(),
            is_token_in_rank.data_ptr(),
        )
        return counts, is_token_in_rank

    def dispatch_fresh(
        self,
        args: DispatchArgs,
        memory: RoutingMemory,
        *,
        formats: Callable[[], ReceiveFormat],
        keep: Any,
        options: CallOptions,
    ) -> FreshDispatch:
        """Exchanges the counts, takes the memory they ask for, sends the rows."""
        seq, host = self.notify(args, memory, options=options)
        received, error = None, ""
        try:
            received = reserve_rows(self.reserve, formats(), host.num_rows)
            point_to(args, received)
        except EPDeviceError as problem:  # every rank has to learn of it
            error = str(problem)
        event = self.send(seq, args, memory, keep=(keep, received), error=error, options=options)
        if received is None:
            event.wait()
            raise EPDeviceError(error)
        return FreshDispatch(seq=seq, host=host, received=received, event=event)

    def notify(
        self, args: DispatchArgs, memory: RoutingMemory, *, options: CallOptions
    ) -> tuple[int, HostCounts]:
        """First half of a fresh dispatch: fills the routing; returns the number of the call."""
        wait_for_previous(options, self.refuse)
        seq = ctypes.c_uint64()
        _native.call(self._library.ep_notify, self._buffer, ctypes.byref(args), ctypes.byref(seq))
        return seq.value, HostCounts.of(memory)

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
        op = ctypes.c_void_p()
        _native.call(
            self._library.ep_send,
            self._buffer,
            seq,
            ctypes.byref(args),
            error.encode() if error else None,
            options.async_op,
            ctypes.byref(op),
        )
        return self._event(op, keep, options)

    def dispatch(
        self, args: DispatchArgs, memory: RoutingMemory, *, keep: Any, options: CallOptions
    ) -> tuple[int, Event]:
        """A dispatch whose memory is known beforehand; returns its number and its event."""
        wait_for_previous(options, self.refuse)
        seq, op = ctypes.c_uint64(), ctypes.c_void_p()
        _native.call(
            self._library.ep_dispatch,
            self._buffer,
            ctypes.byref(args),
            options.async_op,
            ctypes.byref(seq),
            ctypes.byref(op),
        )
        return seq.value, self._event(op, keep, options)

    def combine(
        self, args: CombineArgs, memory: RoutingMemory, *, keep: Any, options: CallOptions
    ) -> Event:
        wait_for_previous(options, self.refuse)
        op = ctypes.c_void_p()
        _native.call(
            self._library.ep_combine,
            self._buffer,
            ctypes.byref(args),
            options.async_op,
            ctypes.byref(op),
        )
        return self._event(op, keep, options)

    def barrier(self) -> None:
        _native.call(self._library.ep_barrier, self._buffer)

    def refuse(self, reason: str) -> None:
        _native.call(self._library.ep_refuse, self._buffer, reason.encode())

    def _event(self, op: ctypes.c_void_p, keep: Any, options: CallOptions) -> Event:
        if options.async_op:
            return self.make_event(op, keep)
        _CpuOperation(self._library, op.value or 0)  # over, and released at once
        return Event()

    def make_event(self, op: ctypes.c_void_p, keep: Any) -> Event:
        """The end of a call; `keep` is kept alive until then."""
        assert op.value is not None
        self.poll()
        operation = _CpuOperation(self._library, op.value)
        self._pending.append((operation, keep))
        return Event(operation)

    # End

    @property
    def core(self) -> int | None:
        """The compiled buffer; None after destroy()."""
        return self._buffer

    def when_destroyed(self, function: Callable[[], None]) -> None:
        """Calls `function` once no call can run any more, before the compiled buffer is gone."""
        self._when_destroyed.append(function)

    def destroy(self) -> None:
        """Leaves the group; results stay valid. Idempotent; does nothing in a forked child."""
        if self._buffer is None or self._pid != os.getpid():
            return
        buffer, self._buffer = self._buffer, None
        _native.call(self._library.ep_buffer_destroy, buffer)
        while self._when_destroyed:
            self._when_destroyed.pop()()
        self._library.ep_buffer_delete(buffer)
        self._pending.clear()
