"""The low-latency methods of Buffer. Symbols as in buffer.py; M = num_max_tokens_per_rank."""

from __future__ import annotations

import torch

from ep_kernels import ll
from ep_kernels.errors import EPConfigError
from ep_kernels.ll_handle import (
    LowLatencyCombineRequest,
    LowLatencyCombineResult,
    LowLatencyDispatchResult,
    LowLatencyHandle,
    LowLatencyRequest,
)


class LowLatencyCalls:
    """What a Buffer made with low_latency_bytes can do besides; docs/low-latency.md."""

    _low_latency: ll.LowLatency | None

    @staticmethod
    def low_latency_size_hint(
        *,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_ranks: int,
        num_experts: int,
        num_local_experts: int | None = None,
    ) -> int:
        """The `low_latency_bytes` that calls of these sizes need, in any of the number formats.

        Args:
            num_max_tokens_per_rank: M.
            hidden: H.
            num_ranks: R.
            num_experts: E.
            num_local_experts: the largest L of all ranks; None: E / R, rounded up.

        Raises:
            EPConfigError: a size is not positive, or beyond what a region can have.
        """
        return ll.size_hint(
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            hidden=hidden,
            num_ranks=num_ranks,
            num_experts=num_experts,
            num_local_experts=num_local_experts,
        )

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        *,
        num_max_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = False,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_op: bool = False,
        return_recv_hook: bool = False,
        cumulative_recv_stats: torch.Tensor | None = None,
        wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> LowLatencyDispatchResult:
        """Sends each token to its experts, into fixed memory.

        The rows of an expert lie packed in the order source rank, then token. At most two results
        can be alive: one is until its handle has been combined, or is gone.

        Args:
            x: [T, H] bfloat16, T <= M; H a multiple of 8, with use_fp8 of 128.
            topk_idx: [T, K] int64, global expert index, each at most once per token; -1 chooses
                none.
            num_max_tokens_per_rank: M, the same on all ranks. It may change from call to call.
            num_experts: E, that of the buffer.
            use_fp8: send rows as e4m3 with one scale, max(amax, 1e-4) / 448, per 128 channels.
            round_scale: round the scales up to powers of two.
            use_ue8m0: return them as exponent bytes, four to an int32; needs round_scale and H a
                multiple of 512.
            async_op: return when the rows are sent; the result is there with `event`.
            return_recv_hook: return when the rows are sent; the result is there when `hook()` has
                run. x and topk_idx may be changed meanwhile.
            cumulative_recv_stats: [L] int32 or int64, rows received are added.
            wait_recv_cost_stats: [R] int64, microseconds waited for each rank are added.

        Raises:
            EPConfigError: an argument is wrong here or on a peer, ranks disagree, the region is
                too small, or two results are alive.
            EPTimeoutError: a peer is dead or silent; with mask_silent_ranks it is masked instead.

        Example:
            Two ranks with one expert each; rank 0 has topk_idx = [[1], [1]], rank 1 [[0], [1]].
            Rank 1 gets recv_count = [3]: both tokens of rank 0, then token 1 of its own.
        """
        request = LowLatencyRequest(
            num_max_tokens_per_rank=num_max_tokens_per_rank,
            num_experts=num_experts,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
            async_op=async_op,
            return_recv_hook=return_recv_hook,
            cumulative_recv_stats=cumulative_recv_stats,
            wait_recv_cost_stats=wait_recv_cost_stats,
        )
        return self._usable_low_latency().dispatch(x, topk_idx, request)

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        *,
        wire_format: str = "bf16",
        zero_copy: bool = False,
        out: torch.Tensor | None = None,
        async_op: bool = False,
        return_recv_hook: bool = False,
        wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> LowLatencyCombineResult:
        """Brings the rows of a low-latency dispatch back, weighted and summed per token.

        The sum is made in fp32, from zero, in the order of topk_idx: the product of weight and
        element is rounded, then added; at the end the sum is rounded once.

        Args:
            x: [L, R * M, H] bfloat16, a row for each row dispatched; the others are not read. It
                may be next_low_latency_combine_buffer(handle), whose rows "fp8" overwrites, but
                must not overlap it otherwise.
            topk_idx: [T, K] int64, as dispatched.
            topk_weights: [T, K] float32.
            handle: of the dispatch; a handle can be combined once.
            wire_format: "bf16", or "fp8" to send e4m3 with scales per 128 channels: half the bytes,
                each element off by at most max(|x| / 16, scale / 1024), scale = amax / 448.
            zero_copy: x is next_low_latency_combine_buffer(handle), and is read where it is.
            out: [T, H] bfloat16 for the result; None makes a new one.
            async_op: return when this rank's rows can be read; the result is there with `event`.
            return_recv_hook: the same; the result is there when `hook()` has run. x must not be
                changed before.
            wait_recv_cost_stats: [R] int64, microseconds waited for each rank are added.

        Raises:
            EPConfigError, EPTimeoutError: as in low_latency_dispatch().
        """
        request = LowLatencyCombineRequest(
            wire_format=wire_format,
            zero_copy=zero_copy,
            out=out,
            async_op=async_op,
            return_recv_hook=return_recv_hook,
            wait_recv_cost_stats=wait_recv_cost_stats,
        )
        return self._usable_low_latency().combine(x, topk_idx, topk_weights, handle, request)

    def next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """[L, R * M, H] bfloat16: where zero_copy=True reads the rows. Valid until the combine."""
        return self._usable_low_latency().next_combine_buffer(handle)

    def mask_rank(self, rank: int, *, masked: bool = True) -> None:
        """Leaves a rank out of low-latency calls and barriers, or takes it back.

        Masking is up to each rank; all but the masked one should do it before the same call.
        Un-masking needs both sides: the rank itself calls clear_masks().

        Args:
            rank: another rank.
            masked: False takes it back.

        Raises:
            EPConfigError: `rank` is none, or this one.
            EPTimeoutError: un-masking: it does not answer; it stays masked, the buffer works on.
        """
        self._usable_low_latency().mask_rank(rank, masked=masked)

    def clear_masks(self) -> None:
        """Takes back all ranks that are masked here, or have masked this one; see mask_rank()."""
        self._usable_low_latency().clear_masks()

    def query_mask(self) -> torch.Tensor:
        """[R] bool, the ranks that are masked here."""
        return self._usable_low_latency().query_mask()

    def _usable_backend(self) -> object:
        raise NotImplementedError

    def _usable_low_latency(self) -> ll.LowLatency:
        self._usable_backend()
        if self._low_latency is None:
            raise EPConfigError(
                "low_latency_bytes=0: this buffer has no low-latency region; "
                "Buffer.low_latency_size_hint() tells how much it needs"
            )
        return self._low_latency
