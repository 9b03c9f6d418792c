"""Low-latency calls of DeepEP's Buffer.

Symbols: T tokens here, M most tokens of a rank, K choices per token, H hidden, E experts, R ranks,
L = E / R experts here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import ep_kernels
from ep_kernels.deep_ep.base import BufferBase, Rows, end_of
from ep_kernels.deep_ep.utils import EventOverlap
from ep_kernels.errors import EPConfigError

Hook = Callable[[], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class LowLatencyHandle:
    """What low_latency_dispatch() gives to low_latency_combine(); opaque."""

    buffer: ep_kernels.Buffer
    handle: Any


class LowLatencyCalls(BufferBase):
    """Calls over memory of fixed size: num_rdma_bytes of a Buffer with low_latency_mode=True, as
    get_low_latency_rdma_size_hint() tells.
    """

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes that Buffer(num_rdma_bytes=) needs for M tokens of H elements."""
        return ep_kernels.Buffer.low_latency_size_hint(
            num_max_tokens_per_rank=num_max_dispatch_tokens_per_rank,
            hidden=hidden,
            num_ranks=num_ranks,
            num_experts=num_experts,
        )

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Before calls of another shape: checks that the memory is large enough. There is nothing
        to clean.

        Raises:
            EPConfigError: it is too small.
        """
        needed = self.get_low_latency_rdma_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, self.group_size, num_experts
        )
        if needed > self.num_rdma_bytes:
            raise EPConfigError(
                f"num_rdma_bytes={self.num_rdma_bytes} is less than the {needed} bytes that "
                f"{num_max_dispatch_tokens_per_rank} tokens of {hidden} elements need"
            )

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Rows, torch.Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Sends each token to its experts, into fixed places.

        Args:
            x: [T, H] bfloat16, T <= M.
            topk_idx: [T, K] int64, -1 = none.
            num_max_dispatch_tokens_per_rank: M.
            num_experts: E.
            cumulative_local_expert_recv_stats: [L] int32, rows received are added.
            dispatch_wait_recv_cost_stats: [R] int64, microseconds waited are added.
            use_fp8: rows travel as float8_e4m3fn with a scale for 128 channels.
            round_scale: scales are powers of two.
            use_ue8m0: scales are exponents, four in an int32.
            async_finish: the current stream does not wait for the rows.
            return_recv_hook: only the send half runs; hook() runs the receive half.

        Returns:
            [L, R * M, H] rows (with fp8 the pair with [L, R * M, H / 128] column-major scales), [L]
            int32 counts, handle, event, hook.

        Raises:
            EPConfigError, EPTimeoutError: as ep_kernels.Buffer.low_latency_dispatch().
        """
        buffer = self._low_latency_buffer(num_experts, x.device)
        result = buffer.low_latency_dispatch(
            x,
            topk_idx,
            num_max_tokens_per_rank=num_max_dispatch_tokens_per_rank,
            num_experts=num_experts,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            async_op=async_finish,
            return_recv_hook=return_recv_hook,
            cumulative_recv_stats=cumulative_local_expert_recv_stats,
            wait_recv_cost_stats=dispatch_wait_recv_cost_stats,
        )
        scales = result.recv_scales
        return (
            result.recv_x if scales is None else (result.recv_x, scales),
            result.recv_count,
            LowLatencyHandle(buffer=buffer, handle=result.handle),
            end_of(result.event, async_finish),
            result.hook,
        )

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Brings the rows back, weighted and summed per token.

        Args:
            x: [L, R * M, H] bfloat16.
            topk_idx: [T, K] int64, as dispatched.
            topk_weights: [T, K] float32.
            handle: of the dispatch; it can be combined once.
            use_logfmt: rows travel in half the bytes (as float8_e4m3fn with scales).
            zero_copy: x is get_next_low_latency_combine_buffer(handle).
            async_finish: as in low_latency_dispatch().
            return_recv_hook: as in low_latency_dispatch().
            out: [T, H] bfloat16 for the result.
            combine_wait_recv_cost_stats: [R] int64, microseconds waited are added.

        Returns:
            [T, H] bfloat16, event, hook.

        Raises:
            EPConfigError, EPTimeoutError: as ep_kernels.Buffer.low_latency_combine().
        """
        result = handle.buffer.low_latency_combine(
            x,
            topk_idx,
            topk_weights,
            handle.handle,
            wire_format="fp8" if use_logfmt else "bf16",
            zero_copy=zero_copy,
            out=out,
            async_op=async_finish,
            return_recv_hook=return_recv_hook,
            wait_recv_cost_stats=combine_wait_recv_cost_stats,
        )
        return result.x, end_of(result.event, async_finish), result.hook

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """[L, R * M, H] bfloat16, where zero_copy reads the rows."""
        return handle.buffer.next_low_latency_combine_buffer(handle.handle)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leaves a rank out of low-latency calls, or takes it back."""
        for buffer in self._shrinkable_buffers():
            buffer.mask_rank(rank_to_mask, masked=mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes 1 for each masked rank, 0 for the others, into [R] int32."""
        mask_status.zero_()
        for buffer in self._shrinkable_buffers():
            mask_status.logical_or_(buffer.query_mask().to(mask_status.device))

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes all ranks back."""
        for buffer in self._shrinkable_buffers():
            buffer.clear_masks()

    def _low_latency_buffer(self, num_experts: int, device: torch.device) -> ep_kernels.Buffer:
        if not self.low_latency_mode or self.num_rdma_bytes <= 0:
            raise EPConfigError(
                f"low_latency_mode={self.low_latency_mode} and num_rdma_bytes="
                f"{self.num_rdma_bytes}: low-latency calls need a Buffer with the mode and the "
                "bytes of get_low_latency_rdma_size_hint()"
            )
        return self._buffer(num_experts, device, is_low_latency=True)

    def _shrinkable_buffers(self) -> list[ep_kernels.Buffer]:
        if not self.enable_shrink:
            raise EPConfigError("enable_shrink=False: this Buffer has no masks")
        buffers = [
            buffer for (*_, is_low_latency), buffer in self._buffers.items() if is_low_latency
        ]
        if not buffers:
            raise EPConfigError("ranks can be masked only after a first low-latency call")
        return buffers
