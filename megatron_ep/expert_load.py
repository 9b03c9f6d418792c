"""How evenly tokens are spread over experts, whatever the dispatcher.

Symbols: L layers of the model, E experts of a layer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ep_kernels.placement import linear_placement, measure, place_experts


@dataclass(frozen=True, kw_only=True)
class ExpertLoad:
    """Tokens per expert since the last report, over all ranks.

    Attributes:
        layer: 1-based number in the model; layers of multi-token prediction follow the last.
        tokens_per_expert: E counts.
    """

    layer: int
    tokens_per_expert: list[int]

    @property
    def mean(self) -> float:
        return sum(self.tokens_per_expert) / len(self.tokens_per_expert)

    @property
    def max_over_mean(self) -> float:
        """1 is perfect balance, E is all tokens on one expert."""
        return max(self.tokens_per_expert) / self.mean if self.mean else 0.0

    @property
    def min_over_mean(self) -> float:
        """1 is perfect balance, 0 is an unused expert."""
        return min(self.tokens_per_expert) / self.mean if self.mean else 0.0


def rank_imbalance(loads: Iterable[ExpertLoad], *, num_ranks: int) -> dict[str, float]:
    """The busiest rank's tokens over the mean, in the layer where it is largest: as experts are
    placed now, and if every layer's experts were placed anew by ep_kernels.placement.

    Args:
        loads: of the layers; without any the result is empty.
        num_ranks: expert parallel ranks.
    """
    values: dict[str, float] = {}
    for load in loads:
        tokens = load.tokens_per_expert
        now = linear_placement(len(tokens), num_ranks)
        anew = place_experts(tokens, num_ranks=num_ranks)
        for name, placement in (("now", now), ("placed_anew", anew)):
            key = f"rank_load_max_over_mean_{name}"
            values[key] = max(values.get(key, 0.0), measure(placement, tokens).ranks)
    return values


class DroppedRows:
    """Counts the rows that found no room in dispatches with a capacity.

    Args:
        chunks: model chunks of this rank.
        device: of the rows.
    """

    def __init__(self, chunks: Iterable[nn.Module], *, device: Any) -> None:
        from megatron.core.transformer.moe.moe_layer import MoELayer

        self._device = device
        self._dispatchers: list[Any] = [
            module.token_dispatcher
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, MoELayer)
        ]

    def report(self) -> int:
        """Rows of all layers and ranks since the last report; collective."""
        total = torch.zeros(1, dtype=torch.int64, device=self._device)
        for dispatcher in self._dispatchers:
            if dispatcher.num_dropped is not None:
                total += dispatcher.num_dropped
                dispatcher.num_dropped.zero_()
        torch.distributed.all_reduce(total)
        return int(total)


class ExpertLoadMeter:
    """Counts what the routers of this rank choose in training passes.

    Args:
        chunks: model chunks of this rank.
        num_layers: of the decoder.
        num_mtp_layers: of multi-token prediction; L is the sum of both.
        num_experts: E.
        device: where to count.
    """

    def __init__(
        self,
        chunks: Iterable[nn.Module],
        *,
        num_layers: int,
        num_mtp_layers: int,
        num_experts: int,
        device: Any,
    ) -> None:
        from megatron.core.transformer.moe.router import Router

        size = (num_layers + num_mtp_layers, num_experts)
        self._counts = torch.zeros(size, dtype=torch.int64, device=device)
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, Router):
                    # NOTE: Megatron-Core numbers layers of multi-token prediction as if they were
                    # the decoder's.
                    of_mtp = re.search(r"\bmtp\.layers\.(\d+)\.", name)
                    layer = (module.layer_number or 0) - 1
                    row = num_layers + int(of_mtp[1]) if of_mtp else layer
                    module.register_forward_hook(functools.partial(self._count, row))

    def _count(self, row: int, router: Any, inputs: Any, output: Any) -> None:
        """With recompute a layer runs twice; only the pass with gradients counts."""
        if router.training and torch.is_grad_enabled() and 0 <= row < len(self._counts):
            _, routing_map = output
            self._counts[row] += routing_map.sum(dim=0)

    def report(self) -> list[ExpertLoad]:
        """Loads of the layers with experts, over all ranks, and starts anew; collective."""
        torch.distributed.all_reduce(self._counts)
        counts = self._counts.tolist()
        self._counts.zero_()
        return [
            ExpertLoad(layer=layer, tokens_per_expert=tokens)
            for layer, tokens in enumerate(counts, 1)
            if any(tokens)
        ]
