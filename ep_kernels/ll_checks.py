"""Checks of what callers pass to low-latency calls; as checks.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ep_kernels import checks
from ep_kernels._native_ll import RECEIVE_ASYNC, RECEIVE_LATER, RECEIVE_NOW
from ep_kernels.errors import EPConfigError
from ep_kernels.ll_handle import LowLatencyCombineRequest, LowLatencyHandle, LowLatencyRequest

BF16, FP8, FP8_ROUNDED, FP8_UE8M0 = range(4)
"""Formats of rows, `csrc/core/ll_args.h`."""

WIRE_FORMATS = {"bf16": 0, "fp8": 1}
MAX_TOKENS = 1 << 20
MAX_RANKS = 256
MAX_HIDDEN, MAX_EXPERTS = 1 << 17, 1 << 14
"""Of a size hint, which has 63 bits: two halves of two rows of 2 H bytes, [L, R * M] each."""


@dataclass(frozen=True, kw_only=True)
class GroupSizes:
    """R, E and L, and where rows live."""

    num_ranks: int
    num_experts: int
    num_local_experts: int
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class CombineInputs:
    """The tensors of a combine as the caller gave them."""

    x: Any
    topk_idx: Any
    topk_weights: Any


def check_dispatch(x: Any, topk_idx: Any, request: LowLatencyRequest, group: GroupSizes) -> None:
    """Tensors and sizes of Buffer.low_latency_dispatch()."""
    checks.check_tensor("x", x, dtypes=[torch.bfloat16], shape=(None, None), device=group.device)
    checks.check_aligned("x", x)
    checks.check_topk_idx(
        topk_idx, num_tokens=x.shape[0], num_experts=group.num_experts, device=group.device
    )
    if request.num_experts != group.num_experts:
        raise EPConfigError(
            f"num_experts={request.num_experts!r}, but this buffer has {group.num_experts}"
        )
    most = request.num_max_tokens_per_rank
    checks.check_int("num_max_tokens_per_rank", most, low=1, high=MAX_TOKENS)
    checks.check_recv_stats(request.cumulative_recv_stats, group.num_local_experts, group.device)
    checks.check_wait_stats(request.wait_recv_cost_stats, group.num_ranks, group.device)


def check_combine(
    inputs: CombineInputs,
    handle: LowLatencyHandle,
    request: LowLatencyCombineRequest,
    group: GroupSizes,
) -> None:
    """Tensors of Buffer.low_latency_combine(), against the dispatch of its handle."""
    x, buffer = inputs.x, handle.combine_buffer
    bf16, shape = [torch.bfloat16], (handle.num_tokens, handle.num_topk)
    checks.check_tensor("x", x, dtypes=bf16, shape=tuple(buffer.shape), device=group.device)
    checks.check_aligned("x", x)
    checks.check_tensor(
        "topk_idx", inputs.topk_idx, dtypes=[torch.int64], shape=shape, device=group.device
    )
    checks.check_tensor(
        "topk_weights",
        inputs.topk_weights,
        dtypes=[torch.float32],
        shape=shape,
        device=group.device,
    )
    if request.wire_format not in WIRE_FORMATS:
        raise EPConfigError(
            f"wire_format={request.wire_format!r} is not one of {', '.join(WIRE_FORMATS)}"
        )
    if request.zero_copy and x.data_ptr() != buffer.data_ptr():
        raise EPConfigError(
            "zero_copy=True needs x to be next_low_latency_combine_buffer(handle), it lies "
            f"at {x.data_ptr():#x} instead of {buffer.data_ptr():#x}"
        )
    if 0 < abs(x.data_ptr() - buffer.data_ptr()) < buffer.nbytes:
        raise EPConfigError(
            f"x at {x.data_ptr():#x} overlaps next_low_latency_combine_buffer(handle), which "
            f"starts at {buffer.data_ptr():#x}: x must be that tensor or lie elsewhere"
        )
    if request.out is not None:
        out_shape = (handle.num_tokens, handle.hidden)
        checks.check_tensor("out", request.out, dtypes=bf16, shape=out_shape, device=group.device)
    checks.check_wait_stats(request.wait_recv_cost_stats, group.num_ranks, group.device)


def receive_mode(request: LowLatencyRequest | LowLatencyCombineRequest) -> int:
    """When the receive half runs, `csrc/bindings/ll_api.h`."""
    if request.async_op and request.return_recv_hook:
        raise EPConfigError("async_op=True and return_recv_hook=True exclude each other")
    if request.return_recv_hook:
        return RECEIVE_LATER
    return RECEIVE_ASYNC if request.async_op else RECEIVE_NOW


def row_format(request: LowLatencyRequest) -> int:
    """The format that the options ask for."""
    if not request.use_fp8 and (request.round_scale or request.use_ue8m0):
        raise EPConfigError(
            f"round_scale={request.round_scale} and use_ue8m0={request.use_ue8m0} need use_fp8"
        )
    if request.use_ue8m0 and not request.round_scale:
        raise EPConfigError("use_ue8m0=True needs round_scale=True: it sends powers of two")
    if not request.use_fp8:
        return BF16
    if request.use_ue8m0:
        return FP8_UE8M0
    return FP8_ROUNDED if request.round_scale else FP8
