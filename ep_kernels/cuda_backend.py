"""The CUDA backend: device memory that the ranks of a node open, and the compiled CUDA core.

Streams. A call that its caller waits for anyway runs on the caller's stream. One with `async_op` or
`previous_event` runs on the buffer's communication stream, which waits for the caller's stream, or
for the event instead. Calls of a buffer run one after the other, whichever their streams.

Results lie in the pool. Memory of the pool that is freed is written again only after everything
that the stream which freed it had been given by then.
"""

from __future__ import annotations

import ctypes
import math
import os
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ep_kernels import _native, _native_cuda
from ep_kernels._native import CombineArgs, DispatchArgs
from ep_kernels._native_cuda import CallOrder
from ep_kernels.backend import CallOptions, FreshDispatch, wait_for_previous
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.config import Settings
from ep_kernels.cuda_memory_pool import TorchPools
from ep_kernels.cuda_pending import CallOnDevice, PendingCalls
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError
from ep_kernels.event import Event
from ep_kernels.handle import HostCounts, RoutingMemory
from ep_kernels.lanes import ScaleoutStats
from ep_kernels.num_sms import measure_num_sms
from ep_kernels.pool import Received, ReceiveFormat, Reservation, RowFormat


def device_id(device: torch.device) -> str:
    """The same for all processes that use the device."""
    return str(torch.cuda.get_device_properties(device).uuid)


class _Block:
    """A range of the pool; returned when calls and tensors are through with it."""

    def __init__(self, free: Any, block: int) -> None:
        self._free, self._block = free, block

    def __del__(self) -> None:
        self._free(self._block)


class RawMemory:
    """Memory of a GPU, as torch wants to be told of it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class _Memory(RawMemory):
    """A block as a tensor sees it. The stream that is current when the tensor dies may still have
    work on the memory, also if a call that is over keeps the block for some time yet.
    """

    def __init__(self, backend: CudaBackend, block: _Block, address: int, num_bytes: int) -> None:
        super().__init__(address, num_bytes)
        self._backend, self._block = backend, block

    def __del__(self) -> None:
        self._backend.note_free()


class CudaOperation(CallOnDevice):
    """A high-throughput call, which others can be ordered behind."""

    def __init__(self, backend: CudaBackend, number: int) -> None:
        super().__init__(backend, number)
        self.backend = backend

    @property
    def is_captured(self) -> bool:
        """Part of a graph: it runs when that does, and counts as finished."""
        return self.number >= _native_cuda.FIRST_CAPTURED


class CudaBackend:
    """One rank's end of the memory on the GPUs of a node.

    Raises:
        EPDeviceError: the CUDA core is not built, or memory cannot be taken or mapped.
    """

    def __init__(self, bootstrap: Bootstrap, settings: Settings) -> None:
        self.device = torch.device(settings.device)
        self._pid = os.getpid()
        self._pool_base, self._pool_bytes = 0, settings.total_pool_bytes
        self.max_num_sms = 1
        self._region: Reservation | None = None
        self._torch_pools = TorchPools(self.device)
        self._when_destroyed: list[Callable[[], None]] = []
        self._pending = PendingCalls()
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
        self._attach(bootstrap, bytes(handle), settings.send_once, problem)
        self.chains_rows = bool(self._library.ep_cuda_chains_rows(self._buffer))
        block, address, offset = self.allocate_block(1)  # any block tells where the pool begins
        self._pool_base = address - offset
        del block
        if settings.low_latency_bytes:
            self._region = self.reserve((settings.low_latency_bytes,), torch.uint8)

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

    def _attach(
        self, bootstrap: Bootstrap, handle: bytes, send_once: str, problem: EPError | None
    ) -> None:
        """Maps the peers' memory; fails on all ranks if it fails on one."""
        own_id = device_id(self.device)
        peers = bootstrap.all_gather((handle, own_id, str(problem or "")))
        is_remote = {"remote": lambda other: other != own_id, "all": bool, "none": lambda _: False}
        remote_ranks = sum(
            is_remote[send_once](device) << rank
            for rank, (_, device, _) in enumerate(peers)
            if rank != bootstrap.rank
        )
        try:
            for rank, (_, _, message) in enumerate(peers):
                if message:
                    raise EPDeviceError(f"rank {rank} has no device memory: {message}")
            handles = b"".join(peer[0] for peer in peers)
            _native.call(self._library.ep_cuda_buffer_attach, self._buffer, handles, remote_ranks)
        except EPError as error:
            problem = error
        for rank, message in enumerate(bootstrap.all_gather(str(problem or ""))):
            if message and problem is None:
                problem = EPDeviceError(f"rank {rank} could not map its peers: {message}")
        if problem is not None:
            self.destroy()
            raise problem

    # Memory

    def allocate_block(self, num_bytes: int) -> tuple[_Block, int, int]:
        """A range of the pool: (block, address, offset)."""
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
        return self._block(block.value), address.value or 0, offset.value

    def _block(self, handle: int) -> _Block:
        return _Block(self._library.ep_cuda_block_free, handle)

    def note_free(self) -> None:
        """A tensor in the pool dies. Calls, and tensors of empty(), come after all that the current
        stream was given; or that of the call that was the last to use the tensor.
        """
        if self._buffer is not None:
            stream = self._pending.stream_of_dying
            self._library.ep_cuda_note_free(
                self._buffer, self._current_stream() if stream is None else stream
            )

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in this rank's pool, for the current stream to write to."""
        self.wait_for_freed(self._current_stream())
        return self.reserve(shape, dtype).tensor()

    def memory_pool(self) -> AbstractContextManager[None]:
        """Has torch allocate from the pool on this thread."""
        assert self._buffer is not None
        return self._torch_pools.use(self._buffer)

    def wait_for_freed(self, stream: int) -> None:
        """Work that the stream is given from now on may write to memory that is free."""
        _native.call(self._library.ep_cuda_wait_for_freed, self._buffer, stream)

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Reservation:
        """Memory of this rank's pool for a tensor. Raises EPDeviceError if the pool is full."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return self._empty(shape, dtype)
        return self._reservation(*self.allocate_block(num_bytes), shape, dtype)

    def _adopt_rows(
        self, receive: _native_cuda.Receive, formats: ReceiveFormat, num_rows: int
    ) -> Received:
        """Memory that the core has taken for what a dispatch fills."""

        def rows_if(rows: _native_cuda.ReceivedRows, of: RowFormat | None) -> Reservation | None:
            return None if of is None else self._adopt(rows, (num_rows, *of.shape), of.dtype)

        return Received(
            x=self._adopt(receive.x, (num_rows, *formats.x.shape), formats.x.dtype),
            scales=rows_if(receive.scales, formats.scales),
            topk_idx=rows_if(receive.topk_idx, formats.topk_idx),
            topk_weights=rows_if(receive.topk_weights, formats.topk_weights),
            chain=rows_if(receive.chain, formats.chain),
        )

    def _adopt(
        self, rows: _native_cuda.ReceivedRows, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Reservation:
        """Memory that the core has taken."""
        if rows.block is None:
            return self._empty(shape, dtype)
        return self._reservation(self._block(rows.block), rows.address, rows.offset, shape, dtype)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Reservation:
        return Reservation(
            offset=0,
            address=0,
            tensor=lambda: torch.empty(shape, dtype=dtype, device=self.device),
        )

    def _reservation(
        self, block: _Block, address: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Reservation:
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(block)

        def tensor() -> torch.Tensor:
            memory = _Memory(self, block, address, math.prod(shape) * dtype.itemsize)
            return torch.as_tensor(memory, device=self.device).view(dtype).view(shape)

        return Reservation(offset=offset, address=address, tensor=tensor)

    def take_region(self) -> tuple[int, torch.Tensor]:
        """The low-latency region, the first range of the pool: (offset, tensor). Once."""
        region, self._region = self._region, None
        assert region is not None
        return region.offset, region.tensor()

    def empty_words(self, num_words: int, *, options: CallOptions) -> torch.Tensor:
        """What torch hands out may be in use by the caller's stream, for which a call with
        `previous_event` does not wait; what was freed in the pool, calls do wait for.
        """
        if options.previous_event is None:
            return torch.empty(num_words, dtype=torch.int64, device=self.device)
        return self.reserve((num_words,), torch.int64).tensor()

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

    # Rates

    def choose_num_sms(self, bootstrap: Bootstrap, wanted: int | None) -> int:
        """SMs of this rank's transfers: those wanted, or the same on all ranks, as measured."""
        properties = torch.cuda.get_device_properties(self.device)
        own_id = device_id(self.device)
        ranks = bootstrap.all_gather((own_id, wanted))
        num_sharing = sum(device == own_id for device, _ in ranks)
        self.max_num_sms = max(1, properties.multi_processor_count // num_sharing)
        if all(of_rank for _, of_rank in ranks):
            assert wanted is not None
            return wanted
        measured = measure_num_sms(
            self._copy_rate,
            pool_bytes=self._pool_bytes - self.pool_stats()["used_bytes"],
            max_num_sms=self.max_num_sms,
        )
        agreed = int(statistics.median_low(bootstrap.all_gather(measured)))
        return wanted or agreed

    def _copy_rate(self, num_sms: int, num_bytes: int) -> float:
        rate = ctypes.c_double()
        _block, _, offset = self.allocate_block(2 * num_bytes)  # no rank has used its pool yet
        _native.call(
            self._library.ep_cuda_copy_rate,
            self._buffer,
            num_sms,
            num_bytes,
            offset,
            ctypes.byref(self._order(None)),
            ctypes.byref(rate),
        )
        return rate.value

    # Calls

    def poll(self) -> None:
        """Lets go of finished calls. One that failed makes this call fail, on every rank.

        Errors that a kernel finds surface at event.wait(), or here; those of graphs only here.
        """
        while (number := self._pending.oldest()) is not None and self.is_finished(number):
            self._pending.drop(number)
            self._check(number)
        if self._captured:
            self._check(_native_cuda.FIRST_CAPTURED)

    def _check(self, number: int) -> None:
        try:
            _native.call(self._library.ep_cuda_check, self._buffer, number)
        except (EPConfigError, EPDeviceError) as error:
            self.refuse(f"an earlier call failed: {error}")
            raise

    def count_rows(self, topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts as of the CPU backend, on the caller's stream. Bad indices count as none: to
        report them, the host would have to wait; dispatch() does it.
        """
        num_tokens, num_experts = topk_idx.shape[0], self._expert_to_rank.numel()
        is_good = (topk_idx >= 0) & (topk_idx < num_experts)
        columns = torch.where(is_good, topk_idx, num_experts)
        is_chosen = torch.zeros(
            (num_tokens, num_experts + 1), dtype=torch.bool, device=self.device
        ).scatter_(1, columns, True)[:, :num_experts]
        is_in_rank = torch.stack(
            [is_chosen[:, experts].any(dim=1) for experts in self._experts_of_rank], dim=1
        )
        counts = torch.cat([is_in_rank.sum(0), is_chosen.sum(0)]).to(torch.int32)
        return counts, is_in_rank

    def dispatch_fresh(
        self,
        args: DispatchArgs,
        memory: RoutingMemory,
        *,
        formats: Callable[[], ReceiveFormat],
        keep: Any,
        options: CallOptions,
    ) -> FreshDispatch:
        """Exchanges counts and fills the routing; the host waits for the sizes, takes the memory
        and has the rows sent."""
        receive, number = _native_cuda.Receive(), ctypes.c_int64()
        num_local = self._num_local_experts
        counts = torch.empty(2 * num_local + 1, dtype=torch.int64)
        address = counts.data_ptr()
        fresh = _native_cuda.FreshCounts(
            num_recv_tokens_per_expert=address, expert_offsets=address + 8 * num_local
        )
        _native.call(
            self._library.ep_cuda_dispatch_fresh,
            self._buffer,
            ctypes.byref(args),
            ctypes.byref(self._order(options)),
            ctypes.byref(receive),
            ctypes.byref(fresh),
            ctypes.byref(number),
        )
        # From here on the device is at work, and the host has time.
        received = self._adopt_rows(receive, formats(), fresh.num_rows)
        host = HostCounts(
            num_rows=fresh.num_rows,
            num_recv_tokens_per_expert=counts[:num_local],
            expert_offsets=counts[num_local:],
        )
        event = self._event(number.value, (keep, received))
        return FreshDispatch(seq=number.value, host=host, received=received, event=event)

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
            self._pending.drop(number)

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
        for number in self._pending.numbers():
            self.wait(number)

    def stamps(self, number: int) -> dict[str, int]:
        """When a finished call reached each of _native_cuda.STAMPS, in nanoseconds of the device's
        timer; without those that it does not have.
        """
        times = (ctypes.c_uint64 * len(_native_cuda.STAMPS))()
        self._library.ep_cuda_stamps(self._buffer, number, times)
        return {name: time for name, time in zip(_native_cuda.STAMPS, times) if time}

    def end_event(self, number: int) -> int | None:
        """The cudaEvent_t at the end of a call."""
        return self._library.ep_cuda_end_event(self._buffer, number)

    def _current_stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def _order(self, options: CallOptions | None) -> CallOrder:
        order = CallOrder(caller=self._current_stream(), follows_caller=1)
        if options is None:
            return order
        order.is_async = options.async_op
        previous = options.previous_event
        if previous is None:
            return order
        operation, is_capturing = previous.operation, torch.cuda.is_current_stream_capturing()
        if not isinstance(operation, CudaOperation):
            wait_for_previous(options, self.refuse)
            order.follows_caller = int(is_capturing)
        elif operation.is_captured != is_capturing:
            pass  # a replay ends when its stream's work does; a capture begins with its own calls
        elif operation.is_captured or not operation.is_finished():
            order.previous = operation.backend.end_event(operation.number)
            order.follows_caller = 0
        else:
            # Its error is not for here: this rank alone would not make the call.
            order.follows_caller = 0
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
            self._pending.add(number, keep, self._current_stream())
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
        self._torch_pools.close()
        self._pending.clear()
        self._captured.clear()
        self._region = None
        _native.call(self._library.ep_cuda_buffer_destroy, buffer)
        while self._when_destroyed:
            self._when_destroyed.pop()()
        self._library.ep_cuda_buffer_delete(buffer)
