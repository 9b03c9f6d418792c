"""The low-latency region of a CUDA rank, and the compiled calls over it; as cpu_ll.py.

Each half of a call is enqueued on the stream that is current when it is asked for, the receive half
of an asynchronous call on a stream of the buffer. The host waits for nothing.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ep_kernels import _native, env
from ep_kernels._native_ll import (
    LL_STAMPS,
    NUM_STAMPED,
    RECEIVE_ASYNC,
    RECEIVE_LATER,
    LlCombineArgs,
    LlDispatchArgs,
    cuda_ll_library,
)
from ep_kernels.cuda_pending import CallOnDevice, PendingCalls
from ep_kernels.errors import EPConfigError
from ep_kernels.event import Event

if TYPE_CHECKING:
    from ep_kernels.cuda_backend import CudaBackend

NUM_SMS = 16


class CudaLlCalls:
    """The low-latency calls of one rank.

    Args:
        library: that has them.
        low_latency: its handle of them, from now on this object's.
        region: uint8, the rank's memory for rows and words.
        max_num_sms: SMs that the rank has for itself.
        finish_calls: waits for the other calls of the buffer.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        low_latency: int | None,
        region: torch.Tensor,
        *,
        max_num_sms: int,
        finish_calls: Callable[[], None],
    ) -> None:
        self._library, self._low_latency, self._region = library, low_latency, region
        self._max_num_sms = max_num_sms
        self._device, self._finish_calls = region.device, finish_calls
        self._pending = PendingCalls()
        self._captured: list[Any] = []  # what a graph will use again

    def choose_num_sms(self, wanted: int | None, *, default: int) -> int:
        """Blocks of a call. Those of all ranks must fit on the GPU: they wait for each other.

        A call that is over in microseconds takes more of them than rates ask for.
        """
        return min(wanted or env.num_sms() or NUM_SMS, self._max_num_sms)

    # Memory

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over the region."""
        num_bytes = math.prod(shape) * dtype.itemsize
        return self._region[offset : offset + num_bytes].view(dtype).view(shape)

    # Calls

    def dispatch(self, args: LlDispatchArgs, receive: int, *, keep: Any) -> tuple[int, int, Event]:
        """Number of the call, window of its rows, and the event of the call."""
        self._poll()
        number, window = ctypes.c_int64(), ctypes.c_int64()
        _native.call(
            self._library.ep_cuda_ll_dispatch,
            self._core(),
            ctypes.byref(args),
            receive,
            self._stream(),
            ctypes.byref(number),
            ctypes.byref(window),
        )
        return number.value, window.value, self._event(number.value, receive, keep)

    def combine(self, args: LlCombineArgs, receive: int, *, keep: Any) -> tuple[int, Event]:
        """Number of the call, and the event of the call."""
        self._poll()
        number = ctypes.c_int64()
        _native.call(
            self._library.ep_cuda_ll_combine,
            self._core(),
            ctypes.byref(args),
            receive,
            self._stream(),
            ctypes.byref(number),
        )
        return number.value, self._event(number.value, receive, keep)

    def receive(self, number: int, *, keep: Any) -> None:
        _native.call(self._library.ep_cuda_ll_receive, self._core(), number, self._stream())
        self._keep_until_finished(number, keep)

    def release(self, dispatch: int) -> None:
        """The handle is gone. Does nothing after destroy()."""
        if self._low_latency is not None:
            self._library.ep_cuda_ll_release(self._low_latency, dispatch)

    def barrier(self) -> None:
        """Waits on the host, too."""
        self._finish_calls()
        _native.call(self._library.ep_cuda_ll_barrier, self._core(), self._stream())

    def refuse(self, reason: str) -> None:
        _native.call(self._library.ep_cuda_ll_refuse, self._core(), reason.encode(), self._stream())

    def mask(self, rank: int) -> None:
        _native.call(self._library.ep_cuda_ll_mask, self._core(), rank, self._stream())

    def unmask(self, rank: int) -> None:
        """Takes a rank back; all masked ones for -1. Waits on the host."""
        _native.call(self._library.ep_cuda_ll_unmask, self._core(), rank, self._stream())

    def query_mask(self, num_ranks: int) -> torch.Tensor:
        """In host memory; waits on the host."""
        mask = torch.zeros(num_ranks, dtype=torch.bool)
        _native.call(
            self._library.ep_cuda_ll_query_mask, self._core(), mask.data_ptr(), self._stream()
        )
        return mask

    def stamps(self) -> torch.Tensor:
        """[NUM_STAMPED, len(LL_STAMPS)] int64 nanoseconds of the device's clock: when the calls of
        late came to each of LL_STAMPS; call number n, replays counted, is in row n modulo the
        rows. 0: never. Waits on the host.
        """
        out = torch.zeros((NUM_STAMPED, len(LL_STAMPS)), dtype=torch.int64)
        _native.call(self._library.ep_cuda_ll_stamps, self._core(), out.data_ptr(), self._stream())
        return out

    # Calls under way

    def is_finished(self, number: int) -> bool:
        return self._low_latency is None or bool(
            self._library.ep_cuda_ll_is_finished(self._low_latency, number)
        )

    def wait(self, number: int) -> None:
        if self._low_latency is None:
            return
        try:
            _native.call(self._library.ep_cuda_ll_wait, self._low_latency, number)
        finally:  # whoever waited knows the outcome; _poll() need not tell it again
            self._pending.drop(number)

    def make_current_stream_wait(self, number: int) -> None:
        if self._low_latency is not None:
            _native.call(
                self._library.ep_cuda_ll_make_stream_wait,
                self._low_latency,
                number,
                self._stream(),
            )

    def _poll(self) -> None:
        """Lets go of finished calls. One that failed makes this call fail, on every rank."""
        if torch.cuda.is_current_stream_capturing():
            return
        while (number := self._pending.oldest()) is not None and self.is_finished(number):
            self._pending.drop(number)
            try:
                _native.call(self._library.ep_cuda_ll_check, self._core(), number)
            except EPConfigError as error:
                self.refuse(f"an earlier call failed: {error}")
                raise

    def _keep_until_finished(self, number: int, keep: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(keep)
        else:
            self._pending.add(number, keep, self._stream())

    def _event(self, number: int, receive: int, keep: Any) -> Event:
        if receive != RECEIVE_LATER:
            self._keep_until_finished(number, keep)
        if torch.cuda.is_current_stream_capturing() and receive != RECEIVE_ASYNC:
            return Event()
        return Event(CallOnDevice(self, number))

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self._device.index)

    def _core(self) -> int:
        if self._low_latency is None:
            raise EPConfigError("this buffer was destroyed and cannot be used any more")
        return self._low_latency

    def _delete(self) -> None:
        low_latency, self._low_latency = self._low_latency, None
        self._pending.clear()
        self._captured.clear()
        self._library.ep_cuda_ll_delete(low_latency)


class CudaLowLatency(CudaLlCalls):
    """Within one node: the region is the first range of the rank's pool.

    Raises:
        EPConfigError: num_bytes is too small for the words that ranks share, or there are more
            experts than the kernels have counters for.
    """

    def __init__(self, backend: CudaBackend, num_bytes: int, *, mask_silent_ranks: bool) -> None:
        library, out = cuda_ll_library(), ctypes.c_void_p()
        offset, region = backend.take_region()
        assert offset == 0, "the region must be at the same place on all ranks"
        _native.call(
            library.ep_cuda_ll_create,
            backend.core,
            offset,
            num_bytes,
            mask_silent_ranks,
            ctypes.byref(out),
        )
        super().__init__(
            library,
            out.value,
            region,
            max_num_sms=backend.max_num_sms,
            finish_calls=backend.finish_calls,
        )
        backend.when_destroyed(self._delete)
