"""The experts of a layer in chunks, so that tokens travel while experts compute.

A micro-batch's tokens are cut into chunks. Transfers run on the buffer's stream (on the CPU: its
thread), one after the other, experts on the caller's; two dispatches are ahead of the experts:

    forward     transfers   D0 D1  D2 C0  D3 C1  C2     C3      D dispatch, C combine
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

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ep_kernels import CombineResult, Layout
from ep_kernels.event import Event
from megatron_ep.pipeline import CallStream, run_pipeline
from megatron_ep.recompute import Transfers

MAX_AUTO_CHUNKS = 4

MIN_AUTO_ROWS = 256
"""Rows that an expert should have in a chunk: a few tiles of a GEMM."""


@dataclass(frozen=True)
class _Chunk:
    """What the backward needs of one chunk: its routing, and the graph from rows to output."""

    handle: Any
    rows: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor


class ChunkedExperts:
    """Takes the place of dispatch, routed_experts_compute and combine of a MoELayer.

    Args:
        layer: with a DeepEPTokenDispatcher.
        num_chunks: chunks of a micro-batch, the same on all ranks; "auto" chooses when the first
            one comes.

    Raises:
        ValueError: num_chunks is no positive number, or the layer is configured for something that
            needs its steps apart.
    """

    def __init__(self, layer: Any, num_chunks: int | str) -> None:
        check_num_chunks(num_chunks)
        _check_config(layer.config)
        self._layer, self._dispatcher = layer, layer.token_dispatcher
        self._num_chunks = num_chunks

    def install(self) -> None:
        """Puts the three methods onto the layer."""
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
        num_chunks = len(kept.sent) if kept else self._resolve_num_chunks(topk_idx)
        parameters = list(self._layer.experts.parameters())
        run = _Run(
            layer=self._layer,
            topk_idx=topk_idx,
            num_chunks=num_chunks,
            kept=kept,
            is_training=torch.is_grad_enabled(),
            parameters=[parameter for parameter in parameters if parameter.requires_grad],
        )
        output: torch.Tensor = _ExpertsFunction.apply(run, hidden_states, probs, *run.parameters)
        return output, None

    def combine(self, output: torch.Tensor) -> torch.Tensor:
        """Nothing: the output is back already."""
        return output

    def _resolve_num_chunks(self, topk_idx: torch.Tensor) -> int:
        if self._num_chunks == "auto":
            self._num_chunks = _choose_num_chunks(
                topk_idx, self._dispatcher.num_local_experts, self._dispatcher.tp_ep_group
            )
        return int(self._num_chunks)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One micro-batch on its way through one layer.

    Attributes:
        topk_idx: [T, K] of all chunks.
        kept: by an earlier forward of the same micro-batch, if this one is a recomputation.
        is_training: whether a backward may follow.
        parameters: of the experts, those that get gradients.
    """

    layer: Any
    topk_idx: torch.Tensor
    num_chunks: int
    kept: Transfers | None
    is_training: bool
    parameters: list[torch.Tensor]

    def forward(
        self, hidden: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, list[_Chunk]]:
        """Output, and the chunks for backward()."""
        if self.kept is not None:
            self._start_shared_experts()
            return self.kept.combined.x.detach(), [self._compute(one) for one in self.kept.sent]
        sent: list[Any] | None = [] if self.layer.token_dispatcher.keeps_transfers else None
        chunks: list[_Chunk] = []
        inputs = zip(
            *(tensor.tensor_split(self.num_chunks) for tensor in (hidden, self.topk_idx, probs))
        )
        buffer = self.layer.token_dispatcher.buffer(hidden.device)

        def compute(arrived: Any) -> tuple[torch.Tensor, Any]:
            if not chunks:
                self._start_shared_experts()
            arrived.event.current_stream_wait()
            if sent is not None:
                sent.append(arrived)
            chunks.append(self._compute(arrived))
            return chunks[-1].output.detach().contiguous(), arrived.handle

        def send_back(output: torch.Tensor, handle: Any) -> Any:
            return buffer.combine(output, handle, async_op=True)

        results = run_pipeline(
            (self._dispatch(buffer, *one) for one in inputs),
            compute,
            send_back,
            calls=CallStream(hidden.device),
        )
        output = torch.cat([_wait(result).x for result in results])
        if sent is not None:
            combined = CombineResult(x=output, topk_weights=None, event=Event())
            self.layer.token_dispatcher.keep(self.topk_idx, tuple(sent), combined)
        return output, chunks

    def backward(
        self, chunks: list[_Chunk], grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        """Gradients of hidden, probs and the parameters."""
        totals: list[torch.Tensor | None] = [None] * len(self.parameters)
        buffer = self.layer.token_dispatcher.buffer(grad.device)
        parts = grad.contiguous().tensor_split(len(chunks))[::-1]
        remaining = iter(chunks[::-1])

        def compute(arrived: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
            chunk = next(remaining)
            arrived.event.current_stream_wait()
            rows, weights, *ours = self._differentiate(chunk, arrived.recv_x)
            totals[:] = [_add(total, one) for total, one in zip(totals, ours)]
            return _or_zeros(rows, chunk.rows), _or_zeros(weights, chunk.weights), chunk.handle

        def send_back(rows: torch.Tensor, weights: torch.Tensor, handle: Any) -> Any:
            return buffer.combine(rows, handle, topk_weights=weights, async_op=True)

        results = run_pipeline(
            (
                buffer.dispatch(part, handle=chunk.handle, async_op=True)
                for chunk, part in zip(chunks[::-1], parts)
            ),
            compute,
            send_back,
            calls=CallStream(grad.device),
        )
        done = [_wait(result) for result in reversed(results)]
        return (
            torch.cat([result.x for result in done]),
            torch.cat([result.topk_weights for result in done]),
            totals,
        )

    def _dispatch(
        self, buffer: Any, hidden: torch.Tensor, topk_idx: torch.Tensor, probs: torch.Tensor
    ) -> Any:
        return buffer.dispatch(
            hidden.detach(),
            topk_idx,
            probs.detach(),
            layout=Layout.EXPERT_MAJOR,
            expert_alignment=self.layer.token_dispatcher.expert_alignment,
            async_op=True,
        )

    def _compute(self, arrived: Any) -> _Chunk:
        rows = arrived.recv_x.detach().requires_grad_(self.is_training)
        weights = arrived.recv_topk_weights.detach().requires_grad_(self.is_training)
        dispatcher = self.layer.token_dispatcher
        with torch.set_grad_enabled(self.is_training):
            output, bias = self.layer.experts(
                rows, dispatcher.tokens_per_expert(arrived), weights.to(dispatcher.probs_dtype)
            )
        assert bias is None, "experts apply their bias themselves"
        return _Chunk(arrived.handle, rows, weights, output)

    def _differentiate(self, chunk: _Chunk, grad: torch.Tensor) -> list[torch.Tensor | None]:
        """Of rows, weights and parameters; None for what the output does not depend on."""
        leaves = [chunk.rows, chunk.weights, *self.parameters]
        if not chunk.output.requires_grad:
            return [None] * len(leaves)
        return list(torch.autograd.grad(chunk.output, leaves, grad, allow_unused=True))

    def _start_shared_experts(self) -> None:
        """While the first tokens travel; their graph is outside of this function's."""
        shared_experts = self.layer.token_dispatcher.shared_experts
        if shared_experts is not None:
            with torch.set_grad_enabled(self.is_training):
                shared_experts.linear_fc1_forward_and_act()


class _ExpertsFunction(torch.autograd.Function):
    """_Run.forward() and _Run.backward() as a node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, run: _Run, hidden: torch.Tensor, probs: torch.Tensor, *_parameters: torch.Tensor
    ) -> torch.Tensor:
        output, ctx.chunks = run.forward(hidden, probs)
        ctx.run = run
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        chunks, ctx.chunks = ctx.chunks, None
        if chunks is None:
            raise RuntimeError(
                "a second backward through experts in chunks, whose graphs are freed"
            )
        hidden, probs, parameters = ctx.run.backward(chunks, grad)
        return None, hidden, probs, *parameters


def check_num_chunks(num_chunks: Any) -> None:
    """Raises ValueError unless it is a positive int or "auto"."""
    is_number = isinstance(num_chunks, int) and not isinstance(num_chunks, bool)
    if num_chunks != "auto" and not (is_number and num_chunks > 0):
        raise ValueError(f"num_chunks={num_chunks!r} is neither a positive number nor 'auto'")


def _check_config(config: Any) -> None:
    for name in ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute"):
        if getattr(config, name, False):
            raise ValueError(f"num_chunks needs {name}=False, which takes the layer's steps apart")
    if config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules:
        raise ValueError("num_chunks cannot work with moe_act among recompute_modules")
    if config.cuda_graph_impl != "none":
        raise ValueError(f"num_chunks needs cuda_graph_impl='none', not {config.cuda_graph_impl!r}")


def _choose_num_chunks(topk_idx: torch.Tensor, num_local_experts: int, group: Any) -> int:
    """As many as leave every expert of every rank MIN_AUTO_ROWS rows, at least 1, at most
    MAX_AUTO_CHUNKS. Collective, since all ranks must agree.
    """
    rows_per_expert = torch.tensor(
        topk_idx.numel() // num_local_experts, dtype=torch.int64, device=topk_idx.device
    )
    torch.distributed.all_reduce(rows_per_expert, torch.distributed.ReduceOp.MIN, group=group)
    return max(1, min(MAX_AUTO_CHUNKS, int(rows_per_expert) // MIN_AUTO_ROWS))


def _wait(result: Any) -> Any:
    result.event.current_stream_wait()
    return result


def _add(total: torch.Tensor | None, one: torch.Tensor | None) -> torch.Tensor | None:
    return one if total is None else total if one is None else total + one


def _or_zeros(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if grad is None else grad.contiguous()
