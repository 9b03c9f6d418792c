"""From Megatron's description of a routing to that of ep_kernels.

Symbols: T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from typing import Any

import torch

ROUTING_BYTES = 16
"""Of the rows that go with a routing: as few as rows may have."""


def to_topk_idx(routing_map: torch.Tensor, *, num_topk: int | None = None) -> torch.Tensor:
    """Lists the experts of each token.

    Args:
        routing_map: [T, E] bool.
        num_topk: K, at least the number of experts of every token; None counts them, for which the
            host waits, and which a CUDA graph cannot.

    Returns:
        [T, K] int64: ascending experts, then -1. If it is counted, K is the most experts of any
        token, at least 1.

    Example:
        >>> to_topk_idx(torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool())
        tensor([[ 1,  3],
                [-1, -1],
                [ 2, -1]])
    """
    num_tokens, num_experts = routing_map.shape
    ordinal = routing_map.cumsum(dim=1)
    if num_topk is None:
        num_topk = max(1, int(ordinal[:, -1].max())) if num_tokens else 1
    experts = torch.arange(num_experts, device=routing_map.device).expand(num_tokens, -1)
    # Column 0 takes what is not chosen. NOTE: an expert past the K-th is out of range, an error.
    column = ordinal * routing_map
    topk_idx = torch.full((num_tokens, num_topk + 1), -1, device=routing_map.device)
    return topk_idx.scatter_(1, column, experts)[:, 1:].contiguous()


def slice_experts(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor, expert_tp: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces each choice by one choice per slice of the expert: [T, K] -> [T, K * expert_tp].

    Example:
        >>> slice_experts(torch.tensor([[1, -1]]), torch.tensor([[0.5, 0.0]]), 2)[0]
        tensor([[ 2,  3, -1, -1]])
    """
    slices = torch.arange(expert_tp, device=topk_idx.device)
    sliced = topk_idx.unsqueeze(-1) * expert_tp + slices
    sliced = sliced.where(topk_idx.unsqueeze(-1) >= 0, -1)
    return sliced.flatten(1), topk_weights.repeat_interleave(expert_tp, dim=1)


def route(buffer: Any, rows: torch.Tensor, topk_idx: torch.Tensor, **options: Any) -> Any:
    """The handle of a dispatch of `rows`, for which next to nothing is sent.

    Args:
        buffer: an ep_kernels.Buffer or an object with its methods.
        rows: [T, H], contiguous, at least ROUTING_BYTES each.
        topk_idx: [T, K] int64.
        **options: of Buffer.dispatch.
    """
    narrow = ROUTING_BYTES // rows.element_size()
    stand_in = rows.view(-1)[: len(rows) * narrow].view(len(rows), narrow)
    return buffer.dispatch(stand_in, topk_idx, **options).handle


def unslice_experts(topk_idx: torch.Tensor, expert_tp: int) -> torch.Tensor:
    """The topk_idx of which slice_experts() made this one: [T, K * expert_tp] -> [T, K].

    Example:
        >>> unslice_experts(torch.tensor([[2, 3, -1, -1]]), 2)
        tensor([[ 1, -1]])
    """
    return topk_idx[:, ::expert_tp].div(expert_tp, rounding_mode="floor")


def place_slices(*, num_experts: int, expert_tp: int, ep_size: int) -> torch.Tensor:
    """Rank of each slice e * expert_tp + s in the group, where ranks count slices first.

    Example:
        >>> place_slices(num_experts=4, expert_tp=2, ep_size=2)
        tensor([0, 1, 0, 1, 2, 3, 2, 3])
    """
    expert = torch.arange(num_experts).unsqueeze(1)
    ep_rank = expert // (num_experts // ep_size)
    return (ep_rank * expert_tp + torch.arange(expert_tp)).flatten()
