"""The experts of a layer in chunks, so that tokens travel while experts compute.

A micro-batch's tokens are cut into chunks. Transfers run on the buffer's stream (on the CPU: its
thread), one after the other, experts on the caller's; two dispatches are ahead of the experts, and
the exchange of all chunks' routings is ahead of everything:

    forward     transfers R D0 D1  D2 C0  D3 C1  C2     C3      R routings, D dispatch, C combine
                experts        E0     E1     E2     E3
    backward    transfers   D3 D2  D1 C3  D0 C2  C1     C0      of gradients, with cached routing
                experts        E3     E2     E1     E0

Autograd would run the backward of one chunk to its end before it starts the next transfer, so the
chunks together are one autograd Function, which keeps the graph of each chunk's experts and runs
these graphs itself. Gradients of the experts' parameters are summed over the chunks and handed out
once, so that hooks on their accumulation, as of data-parallel wrappers, run once per micro-batch.

Output and the gradients of input and probabilities have the bits of the layer in one piece, if the
experts' GEMM computes a row independently of the other rows. Gradients of the experts' parameters
are sums over rows in another order: equal up to rounding.

Symbols as in token_dispatcher.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ep_kernels import Layout
from megatron_ep.choose_chunks import NO_WATCH, Chooser, StopWatch
from megatron_ep.chunk_run import ExpertsFunction, Run
from megatron_ep.recompute import Transfers
from megatron_ep.routing import ROUTING_BYTES


class ChunkedExperts:
    """Takes the place of dispatch, routed_experts_compute and combine of a MoELayer.

    Args:
        layer: with a DeepEPTokenDispatcher.
        num_chunks: chunks of a micro-batch, the same on all ranks; "auto" chooses after some, see
            choose_chunks.py.

    Raises:
        ValueError: num_chunks is no positive number, or the layer is configured for something that
            needs its steps apart.
    """

    def __init__(self, layer: Any, num_chunks: int | str) -> None:
        check_num_chunks(num_chunks)
        _check_config(layer.config)
        self._layer, self._dispatcher = layer, layer.token_dispatcher
        self._num_chunks = num_chunks
        self._chooser: Chooser | None = None

    def install(self) -> None:
        """Puts the three methods onto the layer, and the number of chunks."""
        self._layer.num_chunks = self._num_chunks
        self._layer.dispatch = self.dispatch
        self._layer.routed_experts_compute = self.routed_experts_compute
        self._layer.combine = self.combine

    def dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing: routed_experts_compute() sends the tokens."""
        return hidden_states, probs

    def routed_experts_compute(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Dispatch, experts and combine: [T, H] and [T, K] -> [T, H]."""
        topk_idx, kept = self._dispatcher.take_routing()
        num_chunks, watch = self._resolve_num_chunks(topk_idx, kept)
        parameters = list(self._layer.experts.parameters())
        run = Run(
            layer=self._layer,
            topk_idx=topk_idx,
            num_chunks=num_chunks,
            kept=kept,
            watch=watch,
            is_training=torch.is_grad_enabled(),
            parameters=[parameter for parameter in parameters if parameter.requires_grad],
        )
        output: torch.Tensor = ExpertsFunction.apply(run, hidden_states, probs, *run.parameters)
        return output, None

    def combine(self, output: torch.Tensor) -> torch.Tensor:
        """Nothing: the output is back already."""
        return output

    def _resolve_num_chunks(
        self, topk_idx: torch.Tensor, kept: Transfers | None
    ) -> tuple[int, StopWatch]:
        if kept is not None:
            return len(kept.sent), NO_WATCH
        if self._num_chunks != "auto":
            return int(self._num_chunks), NO_WATCH
        if self._chooser is None:
            dispatcher = self._dispatcher
            self._chooser = Chooser(
                group=dispatcher.tp_ep_group,
                device=topk_idx.device,
                rows_per_expert=topk_idx.numel() // dispatcher.num_local_experts,
                empty_call=functools.partial(_call_without_rows, self._layer, topk_idx),
            )
        watch = self._chooser.next_watch()
        if self._chooser.num_chunks is not None:
            self._num_chunks = self._chooser.num_chunks
        return self._chooser.num_chunks or 1, watch


def _call_without_rows(layer: Any, topk_idx: torch.Tensor) -> None:
    """A fresh dispatch of nothing, waited for."""
    rows = torch.empty(0, ROUTING_BYTES // 4, device=topk_idx.device)
    buffer = layer.token_dispatcher.buffer(topk_idx.device)
    buffer.dispatch(rows, topk_idx[:0], layout=Layout.EXPERT_MAJOR).event.wait()


def check_num_chunks(num_chunks: Any) -> None:
    """Raises ValueError unless it is a positive int or "auto"."""
    is_number = isinstance(num_chunks, int) and not isinstance(num_chunks, bool)
    if num_chunks != "auto" and not (is_number and num_chunks > 0):
        raise ValueError(f"num_chunks={num_chunks!r} is neither a positive number nor 'auto'")


def _check_config(config: Any) -> None:
    for name in ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute"):
        if getattr(config, name, False):
            raise ValueError(
                f"num_chunks and overlap_weight_gradients need {name}=False, which takes the "
                "layer's steps apart"
            )
    if config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules:
        raise ValueError("num_chunks cannot work with moe_act among recompute_modules")
    if config.cuda_graph_impl != "none":
        raise ValueError(f"num_chunks needs cuda_graph_impl='none', not {config.cuda_graph_impl!r}")
