"""What the calls of DeepEP's Buffer share: construction, memory, events."""

from __future__ import annotations

from typing import Any

import torch

import ep_kernels
from ep_kernels.bootstrap import make_bootstrap
from ep_kernels.deep_ep.config import Config
from ep_kernels.deep_ep.utils import EventHandle, EventOverlap
from ep_kernels.errors import EPConfigError
from ep_kernels.event import Event

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class BufferBase:
    """A buffer without its calls; see Buffer.

    The memory behind it needs the number of experts, which DeepEP's constructor is not told. So the
    first call for a number of experts makes an ep_kernels.Buffer, which is collective.

    Args:
        group: process group.
        num_nvl_bytes: bytes of get_local_buffer_tensor(); results take pool memory of their own.
        num_rdma_bytes: the same with use_rdma_buffer=True; with low_latency_mode, memory of the
            low-latency calls besides.
        comm: mpi4py communicator, used instead of a group.
        enable_shrink: masks of ranks work (low-latency calls).
        low_latency_mode: low-latency calls will be made.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl,
        use_fabric, explicitly_destroy: accepted, without effect.

    Raises:
        EPConfigError: neither a group nor a communicator.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        del num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = low_latency_mode, enable_shrink
        self.explicitly_destroy = explicitly_destroy
        self._bootstrap = make_bootstrap(group if comm is None else comm)
        self._group_or_comm = group if comm is None else comm
        self.rank, self.group_size = self._bootstrap.rank, self._bootstrap.num_ranks
        self._buffers: dict[tuple[int, torch.device, bool], ep_kernels.Buffer] = {}
        self._local_memory: dict[bool, torch.Tensor] = {}
        self._is_destroyed = False

    @classmethod
    def set_num_sms(cls, new_num_sms: int) -> None:
        """SMs of the default configs from now on; an even number."""
        if new_num_sms < 1 or new_num_sms % 2:
            raise EPConfigError(f"num_sms={new_num_sms} is not a positive even number")
        cls.num_sms = new_num_sms

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether fp8 rows can be sent: always."""
        return True

    @staticmethod
    def capture() -> EventOverlap:
        """The point that the current stream has reached."""
        return EventOverlap(EventHandle())

    @classmethod
    def get_dispatch_config(cls, num_ranks: int) -> Config:
        """Default config; the same for every number of ranks."""
        if num_ranks < 1:
            raise EPConfigError(f"num_ranks={num_ranks} is not positive")
        return Config(cls.num_sms)

    @classmethod
    def get_combine_config(cls, num_ranks: int) -> Config:
        """Default config; the same for every number of ranks."""
        return cls.get_dispatch_config(num_ranks)

    def get_comm_stream(self) -> Any:
        """A stream for communication: on a GPU one that is kept for this buffer, in order with
        nothing; on the CPU the only one. Transfers run on streams of their own.
        """
        if not torch.cuda.is_available():
            return torch.cpu.current_stream()
        if not hasattr(self, "_stream"):
            self._stream = torch.cuda.Stream()
        return self._stream

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """Memory of this rank, num_nvl_bytes or num_rdma_bytes of it, always the same. No transfer
        uses it.

        Args:
            dtype: of the result.
            size: of the result; None: one dimension, as much as there is.
            offset: bytes.
            use_rdma_buffer: the memory of num_rdma_bytes.

        Raises:
            EPConfigError: it is smaller than `size`.
        """
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        if use_rdma_buffer not in self._local_memory:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._local_memory[use_rdma_buffer] = torch.zeros(
                num_bytes, dtype=torch.uint8, device=device
            )
        rest = self._local_memory[use_rdma_buffer][offset:]
        tensor = rest[: len(rest) // dtype.itemsize * dtype.itemsize].view(dtype)
        if size is None:
            return tensor
        if torch.Size(size).numel() > len(tensor):
            raise EPConfigError(f"size={tuple(size)} is more than the {len(tensor)} elements left")
        return tensor[: torch.Size(size).numel()].view(size)

    def destroy(self) -> None:
        """Leaves the group. Idempotent; results stay valid."""
        self._is_destroyed = True
        while self._buffers:
            self._buffers.popitem()[1].destroy()

    def _buffer(
        self, num_experts: int, device: torch.device, *, is_low_latency: bool = False
    ) -> ep_kernels.Buffer:
        """The memory for so many experts in one mode; collective when it is made."""
        if self._is_destroyed:
            raise EPConfigError("this buffer was destroyed and cannot be used any more")
        key = (num_experts, device, is_low_latency)
        if key not in self._buffers:
            options: dict[str, Any] = {}
            if is_low_latency:
                options["low_latency_bytes"] = self.num_rdma_bytes
                options["mask_silent_ranks"] = self.enable_shrink
            self._buffers[key] = ep_kernels.Buffer(
                self._group_or_comm, num_experts=num_experts, device=device, **options
            )
        return self._buffers[key]


def problem_of_order(
    previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool
) -> str:
    """Why a call cannot be made; "" if it can."""
    if allocate_on_comm_stream and not (async_finish and previous_event is not None):
        return "allocate_on_comm_stream=True needs previous_event and async_finish"
    return ""


def wait_for(previous: EventOverlap | None) -> Event | None:
    """The event of a call, for a transfer to wait for.

    A point of another stream has no such event: the current stream waits for it here, and the
    transfer for the current stream.
    """
    if previous is None or previous.event is None:
        return None
    if previous.event.call is None:
        previous.event.current_stream_wait()
    return previous.event.call


def end_of(event: Event, async_finish: bool) -> EventOverlap:
    return EventOverlap(EventHandle(event) if async_finish else None)
