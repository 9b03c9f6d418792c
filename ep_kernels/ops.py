"""dispatch and combine as operators of torch.library: for torch.compile, with gradients.

    sent = ops.dispatch(buffer, x, topk_idx, topk_weights, capacity=4096)
    y = experts(sent.recv_x, sent.num_recv_tokens_per_expert)
    out, _ = ops.combine(buffer, y, sent.handle)

A compiled graph needs sizes that are known beforehand, hence the capacity. The operators are
collective, forward and backward: all ranks have to run the same graph. Symbols as in buffer.py.

    ep_kernels::dispatch         x, routing -> rows        backward: combine
    ep_kernels::dispatch_again   x, handle -> rows         backward: combine
    ep_kernels::combine          rows, handle -> x         backward: dispatch_again
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep_kernels.buffer import Buffer
from ep_kernels.config import Layout
from ep_kernels.handle import NUM_CALL_FIELDS, DispatchResult, RoutingMemory, routing_sizes
from ep_kernels.registry import find


class Handle(NamedTuple):
    """Routing of a dispatch, in a form that a graph can carry.

    Attributes:
        words, call: see DispatchHandle.to_tensors().
        num_tokens: T.
        recv_shape: of a weight per received choice: RANK_MAJOR [capacity, K], EXPERT_MAJOR
            [capacity].
        num_topk: K.
    """

    words: Tensor
    call: Tensor
    num_tokens: int
    recv_shape: list[int]
    num_topk: int


class Dispatched(NamedTuple):
    """Rows received; see DispatchResult. Rows that nothing fills are zero.

    Attributes:
        recv_x: [capacity, H].
        recv_topk_idx: [capacity, K] int64, local experts, -1 elsewhere; EXPERT_MAJOR: None.
        recv_topk_weights: [capacity, K], EXPERT_MAJOR [capacity]; None when none were sent.
        num_recv_tokens_per_expert: [L] int64.
        expert_offsets: [L + 1] int64; RANK_MAJOR: None.
        num_overflow: [1] int64, rows dropped here because of the capacity.
        handle: for combine().
    """

    recv_x: Tensor
    recv_topk_idx: Tensor | None
    recv_topk_weights: Tensor | None
    num_recv_tokens_per_expert: Tensor
    expert_offsets: Tensor | None
    num_overflow: Tensor
    handle: Handle


def dispatch(
    buffer: Buffer,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None = None,
    *,
    capacity: int,
    layout: Layout = Layout.RANK_MAJOR,
    expert_alignment: int = 1,
) -> Dispatched:
    """Buffer.dispatch() with a capacity, for compiled graphs, with gradients.

    Args:
        buffer: has to outlive the graph, which knows it by name.
        x: [T, H] bfloat16, float16, float32 or float64.
        topk_idx: [T, K] int64, -1 chooses none.
        topk_weights: [T, K] float32 or float64, or None.
        capacity: rows of the result.
        layout: as in Buffer.dispatch().
        expert_alignment: as in Buffer.dispatch().

    Raises:
        EPError: as Buffer.dispatch().
    """
    if not isinstance(layout, Layout):
        buffer.refuse(f"layout={layout!r} is not a Layout")
    by_rank = layout is Layout.RANK_MAJOR
    recv_x, recv_topk_idx, recv_topk_weights, words, call = _dispatch(
        x, topk_idx, topk_weights, buffer.name, layout.value, expert_alignment, capacity
    )
    num_tokens, num_topk = topk_idx.shape
    memory = RoutingMemory(words=words, **_routing_sizes(buffer, topk_idx, layout))
    return Dispatched(
        recv_x=recv_x,
        recv_topk_idx=recv_topk_idx if by_rank else None,
        recv_topk_weights=None if topk_weights is None else recv_topk_weights,
        num_recv_tokens_per_expert=memory.num_recv_tokens_per_expert,
        expert_offsets=None if by_rank else memory.expert_offsets,
        num_overflow=memory.recv_sizes[2:3],
        handle=Handle(words, call, num_tokens, _recv_shape(layout, capacity, num_topk), num_topk),
    )


def combine(
    buffer: Buffer, x: Tensor, handle: Handle, *, topk_weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Buffer.combine() for compiled graphs, with gradients.

    Args:
        buffer: the one that dispatched.
        x: [capacity, H], a row for each row of the dispatch.
        handle: of the dispatch.
        topk_weights: RANK_MAJOR [capacity, K], EXPERT_MAJOR [capacity], or None.

    Returns:
        [T, H] sums, and [T, K] weights or None.

    Raises:
        EPError: as Buffer.combine().
    """
    out, weights = _combine(
        x,
        topk_weights,
        handle.words,
        handle.call,
        buffer.name,
        handle.num_tokens,
        handle.num_topk,
        handle.recv_shape,
    )
    return out, None if topk_weights is None else weights


# The operators. Tensors that a call does not have are empty in their results.


@torch.library.custom_op("ep_kernels::dispatch", mutates_args=())
def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    buffer_name: str,
    layout: str,
    expert_alignment: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """recv_x, recv_topk_idx, recv_topk_weights, words, call."""
    result = find(buffer_name).dispatch(
        x,
        topk_idx,
        topk_weights,
        layout=Layout(layout),
        expert_alignment=expert_alignment,
        capacity=capacity,
    )
    _zero_unfilled(result)
    return (
        result.recv_x,
        _or_empty(result.recv_topk_idx, topk_idx),
        _or_empty(result.recv_topk_weights, x),
        *result.handle.to_tensors(),
    )


@_dispatch.register_fake
def _(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    buffer_name: str,
    layout: str,
    expert_alignment: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    recv_shape = _recv_shape(Layout(layout), capacity, topk_idx.shape[1])
    has_topk_idx = Layout(layout) is Layout.RANK_MAJOR
    sizes = _routing_sizes(find(buffer_name), topk_idx, Layout(layout))
    return (
        x.new_empty(capacity, x.shape[1]),
        topk_idx.new_empty(recv_shape if has_topk_idx else (0,)),
        _fake_weights(x, topk_weights, recv_shape),
        topk_idx.new_empty(RoutingMemory.num_words(**sizes)),
        torch.empty(NUM_CALL_FIELDS, dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("ep_kernels::dispatch_again", mutates_args=())
def _dispatch_again(
    x: Tensor,
    topk_weights: Tensor | None,
    words: Tensor,
    call: Tensor,
    buffer_name: str,
    recv_shape: list[int],
    num_topk: int,
) -> tuple[Tensor, Tensor]:
    """recv_x, recv_topk_weights."""
    buffer = find(buffer_name)
    result = buffer.dispatch(x, None, topk_weights, handle=buffer.restore_handle(words, call))
    _zero_unfilled(result)
    return result.recv_x, _or_empty(result.recv_topk_weights, x)


@_dispatch_again.register_fake
def _(
    x: Tensor,
    topk_weights: Tensor | None,
    words: Tensor,
    call: Tensor,
    buffer_name: str,
    recv_shape: list[int],
    num_topk: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(recv_shape[0], x.shape[1]), _fake_weights(x, topk_weights, recv_shape)


@torch.library.custom_op("ep_kernels::combine", mutates_args=())
def _combine(
    x: Tensor,
    topk_weights: Tensor | None,
    words: Tensor,
    call: Tensor,
    buffer_name: str,
    num_tokens: int,
    num_topk: int,
    recv_shape: list[int],
) -> tuple[Tensor, Tensor]:
    """x, topk_weights."""
    buffer = find(buffer_name)
    result = buffer.combine(x, buffer.restore_handle(words, call), topk_weights=topk_weights)
    return result.x, _or_empty(result.topk_weights, x)


@_combine.register_fake
def _(
    x: Tensor,
    topk_weights: Tensor | None,
    words: Tensor,
    call: Tensor,
    buffer_name: str,
    num_tokens: int,
    num_topk: int,
    recv_shape: list[int],
) -> tuple[Tensor, Tensor]:
    weights = _fake_weights(x, topk_weights, (num_tokens, num_topk))
    return x.new_empty(num_tokens, x.shape[1]), weights


def _routing_sizes(buffer: Buffer, topk_idx: Tensor, layout: Layout) -> dict[str, int]:
    num_tokens, num_topk = topk_idx.shape
    return routing_sizes(
        layout,
        num_ranks=buffer.num_ranks,
        num_local_experts=buffer.num_local_experts,
        num_tokens=num_tokens,
        num_topk=num_topk,
    )


def _recv_shape(layout: Layout, capacity: int, num_topk: int) -> list[int]:
    """Of the weights received, see Handle."""
    return [capacity, num_topk] if layout is Layout.RANK_MAJOR else [capacity]


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _fake_weights(x: Tensor, weights: Tensor | None, shape: Sequence[int]) -> Tensor:
    return x.new_empty(0) if weights is None else weights.new_empty(shape)


def _zero_unfilled(result: DispatchResult) -> None:
    """Zeroes the rows past the last one received: experts compute with them, and with their
    gradients.
    """
    num_filled = result.handle.memory.recv_sizes[0]
    for tensor in (result.recv_x, result.recv_topk_weights):
        if tensor is None:
            continue
        if tensor.device.type == "cpu":
            tensor[int(num_filled) :].zero_()
        else:  # without waiting for the number
            is_unfilled = torch.arange(len(tensor), device=tensor.device) >= num_filled
            tensor.masked_fill_(is_unfilled.view(-1, *[1] * (tensor.dim() - 1)), 0)


# Gradients. Both transfers are linear, so only the routing is kept.


def _keep_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _x, topk_idx, weights, buffer_name, layout, _alignment, capacity = inputs
    num_tokens, num_topk = topk_idx.shape
    recv_shape = _recv_shape(Layout(layout), capacity, num_topk)
    _keep(ctx, weights, output[3:], (buffer_name, num_tokens, num_topk, recv_shape))


def _keep_dispatch_again(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, words, call, buffer_name, recv_shape, num_topk = inputs
    _keep(ctx, weights, (words, call), (buffer_name, x.shape[0], num_topk, recv_shape))


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _x, weights, words, call, buffer_name, _num_tokens, num_topk, recv_shape = inputs
    _keep(ctx, weights, (words, call), (buffer_name, recv_shape, num_topk))


def _keep(ctx: Any, weights: Tensor | None, routing: Any, backward_args: tuple[Any, ...]) -> None:
    ctx.has_weights, ctx.backward_args = weights is not None, backward_args
    ctx.save_for_backward(*routing)


def _backward(ctx: Any, operator: Any, grad_x: Tensor, grad_weights: Tensor) -> tuple[Any, Any]:
    rows, weights = operator(
        grad_x.contiguous(),
        grad_weights.contiguous() if ctx.has_weights else None,
        *ctx.saved_tensors,
        *ctx.backward_args,
    )
    return rows, weights if ctx.has_weights else None


def _dispatch_backward(
    ctx: Any, grad_x: Tensor, _topk_idx: None, grad_weights: Tensor, *_routing: None
) -> tuple[Any, ...]:
    rows, weights = _backward(ctx, _combine, grad_x, grad_weights)
    return rows, None, weights, None, None, None, None


def _dispatch_again_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor) -> tuple[Any, ...]:
    return *_backward(ctx, _combine, grad_x, grad_weights), None, None, None, None, None


def _combine_backward(ctx: Any, grad_x: Tensor, grad_weights: Tensor) -> tuple[Any, ...]:
    return *_backward(ctx, _dispatch_again, grad_x, grad_weights), *[None] * 6


_dispatch.register_autograd(_dispatch_backward, setup_context=_keep_dispatch)
_dispatch_again.register_autograd(_dispatch_again_backward, setup_context=_keep_dispatch_again)
_combine.register_autograd(_combine_backward, setup_context=_keep_combine)
