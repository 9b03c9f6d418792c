"""dispatch and combine as differentiable functions, each the other's backward.

    forward     dispatch: rows out, weights out          combine: rows back and summed, weights back
    backward    combine:  their gradients back           dispatch: their gradients out

Both are linear in rows and in weights, so the backward needs the routing (the handle) and no tensor
of the forward: inputs and outputs may be freed as soon as the forward is over. Nothing is kept
outside the autograd graph, so any number of calls may be in flight.

Symbols (as in ep_kernels):
    T  tokens on this rank    K  choices per token    H  hidden
    N  rows on this rank after dispatch
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ep_kernels import CombineResult, DispatchResult
from megatron_ep.fp8_rows import quantise, received_rows


class DispatchFunction(torch.autograd.Function):
    """Buffer.dispatch; the gradients of rows and weights come back through Buffer.combine."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        buffer: Any,
        options: dict[str, Any],
        kept: DispatchResult | None = None,
        fp8: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, DispatchResult]:
        """Returns recv_x, recv_topk_weights and the whole result."""
        result = kept
        if result is None:
            rows = quantise(x) if fp8 else x
            result = buffer.dispatch(rows, topk_idx, topk_weights, **options)
        ctx.buffer, ctx.handle = buffer, result.handle
        ctx.num_sms = options.get("num_sms")
        return received_rows(result, x.dtype), _alias(result.recv_topk_weights), result

    @staticmethod
    def backward(
        ctx: Any, grad_x: torch.Tensor, grad_weights: torch.Tensor | None, _: None
    ) -> tuple[Any, ...]:
        grad_x, grad_weights, _result = CombineFunction.apply(
            grad_x.contiguous(),
            None if grad_weights is None else grad_weights.contiguous(),
            ctx.buffer,
            ctx.handle,
            {"num_sms": ctx.num_sms},
        )
        return grad_x, grad_weights, None, None, None, None, None


class CombineFunction(torch.autograd.Function):
    """Buffer.combine; the gradients of rows and weights go out again through Buffer.dispatch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        buffer: Any,
        handle: Any,
        options: dict[str, Any],
        kept: CombineResult | None = None,
        *biases: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, CombineResult]:
        """Returns the combined x, the combined topk_weights and the whole result."""
        bias = biases[0] if len(biases) == 1 else biases or None
        result: CombineResult = kept or buffer.combine(
            x, handle, topk_weights=topk_weights, bias=bias, **options
        )
        ctx.buffer, ctx.handle, ctx.num_biases = buffer, handle, len(biases)
        ctx.num_sms = options.get("num_sms")
        return _alias(result.x), _alias(result.topk_weights), result

    @staticmethod
    def backward(
        ctx: Any, grad_x: torch.Tensor, grad_weights: torch.Tensor | None, _: None
    ) -> tuple[Any, ...]:
        grad_rows, grad_row_weights, _result = DispatchFunction.apply(
            grad_x.contiguous(),
            None if grad_weights is None else grad_weights.contiguous(),
            None,
            ctx.buffer,
            {"handle": ctx.handle, "num_sms": ctx.num_sms},
        )
        return grad_rows, grad_row_weights, None, None, None, None, *[grad_x] * ctx.num_biases


def dispatch(
    buffer: Any,
    x: torch.Tensor,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None = None,
    *,
    fp8: bool = False,
    kept: DispatchResult | None = None,
    delivered: list[DispatchResult] | None = None,
    **options: Any,
) -> DispatchResult:
    """Buffer.dispatch with gradients for x and topk_weights.

    The backward is a collective call as well: on every rank of the group the result has to be part
    of the graph of a loss, and backwards have to run in the same order.

    Args:
        buffer: an ep_kernels.Buffer or an object with its methods.
        x: [T, H] float64, float32, float16 or bfloat16.
        topk_idx: [T, K] int64, -1 chooses none; None with a handle among the options.
        topk_weights: [T, K] float32 or float64, or None.
        fp8: rows travel as fp8 and are dequantised on arrival, for which the current stream waits
            for them; their gradients travel in the dtype of x.
        kept: what the same dispatch delivered before, to be had again without communication. The
            backward communicates.
        delivered: is given what Buffer.dispatch gave, to be kept.
        **options: those of Buffer.dispatch. NOTE: rows that a `capacity` leaves unfilled may be
            anything, NaN too, in the result and in the gradients that reach it: what computes with
            rows has to keep them apart, as grouped_gemm.py does by handle.expert_offsets. A row
            that found no room adds nothing to combine()'s sum, and its gradients are zero.

    Returns:
        The result of Buffer.dispatch; recv_x and recv_topk_weights carry gradients.

    Raises:
        TypeError: a pair of fp8 rows and scales, which have no gradient.
        EPError: see Buffer.dispatch.

    Example:
        >>> sent = dispatch(buffer, x, topk_idx, topk_weights, layout=Layout.EXPERT_MAJOR)
        >>> y = experts(sent.recv_x, sent.expert_offsets) * sent.recv_topk_weights[:, None]
        >>> combine(buffer, y, sent.handle).x.sum().backward()
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a {type(x).__name__}: only a tensor of rows has a gradient")
    recv_x, weights, result = DispatchFunction.apply(
        x, topk_weights, topk_idx, buffer, options, kept, fp8
    )
    if delivered is not None:
        delivered.append(result)
    return replace(result, recv_x=recv_x, recv_scales=None, recv_topk_weights=weights)


def combine(
    buffer: Any,
    x: torch.Tensor,
    handle: Any,
    *,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    kept: CombineResult | None = None,
    **options: Any,
) -> CombineResult:
    """Buffer.combine with gradients for x, topk_weights and bias.

    Args:
        buffer: the buffer that dispatched.
        x: [N, H], a row for each row that dispatch delivered.
        handle: of that dispatch.
        topk_weights: RANK_MAJOR [N, K], EXPERT_MAJOR [N], or None.
        bias: [T, H] or a pair of them, added to the sum, or None.
        kept: as of dispatch().
        **options: the other options of Buffer.combine.

    Returns:
        The result of Buffer.combine; x and topk_weights carry gradients.

    Raises:
        EPError: see Buffer.combine.
    """
    biases = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
    y, weights, result = CombineFunction.apply(
        x, topk_weights, buffer, handle, options, kept, *biases
    )
    return replace(result, x=y, topk_weights=weights)


def _alias(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same memory, as no view: results lie in the buffer's pool as views of its bytes, and
    autograd would forbid changing those in place.
    """
    return None if tensor is None else tensor.detach()
