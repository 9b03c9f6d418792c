"""The way of one micro-batch through dispatch, experts and combine in chunks, and its backward.

Order and streams: see overlap.py and pipeline.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ep_kernels import CombineResult, Layout
from ep_kernels.event import Event
from megatron_ep.choose_chunks import StopWatch
from megatron_ep.fp8_rows import quantise, received_rows
from megatron_ep.free_sms import free_sms
from megatron_ep.grouped_gemm import LateWeightGradients
from megatron_ep.pipeline import CallStream, run_pipeline
from megatron_ep.recompute import Transfers
from megatron_ep.routing import route
from megatron_ep.trace import computing


@dataclass(frozen=True)
class Chunk:
    """What the backward needs of one chunk: its routing, and the graph from rows to output."""

    handle: Any
    rows: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Run:
    """One micro-batch on its way through one layer.

    Attributes:
        topk_idx: [T, K] of all chunks.
        watch: takes the times of the forward's steps, if it is asked to.
        kept: by an earlier forward of the same micro-batch, if this one is a recomputation.
        is_training: whether a backward may follow.
        parameters: of the experts, those that get gradients.
    """

    layer: Any
    topk_idx: torch.Tensor
    num_chunks: int
    kept: Transfers | None
    watch: StopWatch
    is_training: bool
    parameters: list[torch.Tensor]

    def forward(
        self, hidden: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, list[Chunk]]:
        """Output, and the chunks for backward()."""
        chunks: list[Chunk]
        if self.kept is not None:
            self._start_shared_experts()
            chunks = [self._compute(one, hidden.dtype) for one in self.kept.sent]
            return self.kept.combined.x.detach(), chunks
        sent: list[Any] | None = [] if self.layer.token_dispatcher.keeps_transfers else None
        chunks = []
        buffer = self.layer.token_dispatcher.buffer(hidden.device)

        def compute(arrived: Any) -> tuple[torch.Tensor, Any]:
            if not chunks:
                self._start_shared_experts()
            arrived.event.current_stream_wait()
            self.layer.token_dispatcher.count_dropped(arrived)
            if sent is not None:
                sent.append(arrived)
            with self.watch.experts():
                chunks.append(self._compute(arrived, hidden.dtype))
            return chunks[-1].output.detach().contiguous(), arrived.handle

        num_sms = self._sms_of_combines()

        def send_back(output: torch.Tensor, handle: Any) -> Any:
            return buffer.combine(output, handle, num_sms=next(num_sms), async_op=True)

        self.watch.begin()
        results = run_pipeline(
            self._dispatches(buffer, hidden.detach(), probs.detach()),
            compute,
            send_back,
            calls=CallStream(hidden.device),
        )
        output = torch.cat([_wait(result).x for result in results])
        self.watch.end()
        if sent is not None:
            combined = CombineResult(x=output, topk_weights=None, event=Event())
            self.layer.token_dispatcher.keep(self.topk_idx, tuple(sent), combined)
        return output, chunks

    def backward(
        self, chunks: list[Chunk], grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        """Gradients of hidden, probs and the parameters."""
        sums = GradientSums(self.parameters)
        late = LateWeightGradients() if self._overlaps_weight_gradients else None
        buffer = self.layer.token_dispatcher.buffer(grad.device)
        parts = grad.contiguous().tensor_split(len(chunks))[::-1]
        remaining = iter(chunks[::-1])
        sms_of_dispatches = self._sms_of_dispatches()
        sms_of_combines = self._sms_of_combines(overlaps_last=late is not None)

        def compute(arrived: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
            chunk = next(remaining)
            arrived.event.current_stream_wait()
            rows, weights, *ours = self._differentiate(chunk, arrived.recv_x, late)
            sums.add(ours)
            return _or_zeros(rows, chunk.rows), _or_zeros(weights, chunk.weights), chunk.handle

        def send_back(rows: torch.Tensor, weights: torch.Tensor, handle: Any) -> Any:
            num_sms = next(sms_of_combines)
            return buffer.combine(
                rows, handle, topk_weights=weights, num_sms=num_sms, async_op=True
            )

        def finish() -> None:
            if late is not None:
                with self._free_sms(), computing("weight gradients"):
                    sums.add(late.compute(self.parameters))

        results = run_pipeline(
            (
                buffer.dispatch(part, handle=chunk.handle, num_sms=num_sms, async_op=True)
                for chunk, part, num_sms in zip(chunks[::-1], parts, sms_of_dispatches)
            ),
            compute,
            send_back,
            calls=CallStream(grad.device),
            finish=finish,
        )
        done = [_wait(result) for result in reversed(results)]
        return (
            torch.cat([result.x for result in done]),
            torch.cat([result.topk_weights for result in done]),
            sums.totals,
        )

    def _dispatches(self, buffer: Any, hidden: torch.Tensor, probs: torch.Tensor) -> Iterator[Any]:
        """Sends one chunk after the other. The routings of all are there before the first chunk
        goes: a host that asked for a later one would have to wait for the transfers before it.
        """
        dispatcher, num_chunks = self.layer.token_dispatcher, self.num_chunks
        parts = [t.tensor_split(num_chunks) for t in (hidden, self.topk_idx, probs)]
        options = {
            "layout": Layout.EXPERT_MAJOR,
            "expert_alignment": dispatcher.expert_alignment,
            "async_op": True,
        }
        sms = self._sms_of_dispatches()
        if dispatcher.capacity_factor is not None:
            # No host asks for any routing.
            outgoing = self._outgoing(hidden, parts[0])
            for rows, topk_idx, weights, num_sms in zip(outgoing, *parts[1:], sms):
                options |= {"capacity": dispatcher.capacity(topk_idx), "num_sms": num_sms}
                yield buffer.dispatch(rows, topk_idx, weights, **options)
            return
        first, *others = zip(*parts)
        handles = [route(buffer, rows, topk_idx, **options) for rows, topk_idx, _ in others]
        outgoing = self._outgoing(hidden, parts[0])
        yield buffer.dispatch(outgoing[0], *first[1:], num_sms=next(sms), **options)
        for rows, (_, _, weights), handle, num_sms in zip(outgoing[1:], others, handles, sms):
            yield buffer.dispatch(
                rows, topk_weights=weights, handle=handle, num_sms=num_sms, async_op=True
            )

    def _sms_of_dispatches(self) -> Iterator[int | None]:
        """num_sms of each in turn: next to the first one no expert runs."""
        yield None
        yield from itertools.repeat(self.layer.token_dispatcher.overlap_num_sms)

    def _sms_of_combines(self, *, overlaps_last: bool = False) -> Iterator[int | None]:
        """num_sms of each in turn: as a rule no expert runs next to the last one."""
        of_overlapping = self.layer.token_dispatcher.overlap_num_sms
        yield from [of_overlapping] * (self.num_chunks - 1)
        yield of_overlapping if overlaps_last else None

    def _free_sms(self, *, is_overlapped: bool = True) -> contextlib.AbstractContextManager[None]:
        """Around experts: they leave free what transfers take."""
        return free_sms(self.layer.token_dispatcher.overlap_num_sms if is_overlapped else None)

    @property
    def _overlaps_weight_gradients(self) -> bool:
        return bool(self.layer.token_dispatcher.overlaps_weight_gradients)

    def _outgoing(self, hidden: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[Any]:
        """What is sent of each chunk: its rows, or fp8 rows and scales."""
        if not self.layer.token_dispatcher.sends_fp8:
            return list(parts)
        return list(zip(*(t.tensor_split(self.num_chunks) for t in quantise(hidden))))

    def _compute(self, arrived: Any, dtype: torch.dtype) -> Chunk:
        rows = received_rows(arrived, dtype).requires_grad_(self.is_training)
        weights = arrived.recv_topk_weights.detach().requires_grad_(self.is_training)
        dispatcher = self.layer.token_dispatcher
        free = self._free_sms(is_overlapped=self.num_chunks > 1)
        with torch.set_grad_enabled(self.is_training), free:
            output, bias = self.layer.experts(
                rows, dispatcher.groups(arrived), weights.to(dispatcher.probs_dtype)
            )
        assert bias is None, "experts apply their bias themselves"
        return Chunk(arrived.handle, rows, weights, output)

    def _differentiate(
        self, chunk: Chunk, grad: torch.Tensor, late: LateWeightGradients | None
    ) -> list[torch.Tensor | None]:
        """Of rows, weights and parameters; None for what the output does not depend on, and for
        what is left to `late`."""
        leaves = [chunk.rows, chunk.weights, *self.parameters]
        if not chunk.output.requires_grad:
            return [None] * len(leaves)
        free = self._free_sms(is_overlapped=self.num_chunks > 1)
        with free, late or contextlib.nullcontext():
            return list(torch.autograd.grad(chunk.output, leaves, grad, allow_unused=True))

    def _start_shared_experts(self) -> None:
        """While the first tokens travel; their graph is outside of this function's."""
        shared_experts = self.layer.token_dispatcher.shared_experts
        if shared_experts is not None:
            with torch.set_grad_enabled(self.is_training):
                shared_experts.linear_fc1_forward_and_act()


class GradientSums:
    """Sums of gradients over chunks.

    Args:
        parameters: whose gradients come.

    Attributes:
        totals: of each parameter; None where no gradient came.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._parameters = parameters
        self.totals: list[torch.Tensor | None] = [None] * len(parameters)

    def add(self, grads: list[torch.Tensor | None]) -> None:
        """Adds those of a chunk, all of them in one call of torch."""
        pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for index, (total, grad) in enumerate(zip(self.totals, grads)):
            if total is None:
                self.totals[index] = grad
            elif grad is not None and not _is_accumulated(self._parameters[index]):
                pairs[index] = total, grad
        if pairs:
            for index, total in zip(pairs, torch._foreach_add(*map(list, zip(*pairs.values())))):
                self.totals[index] = total


def _is_accumulated(parameter: torch.Tensor) -> bool:
    """Whether the backward of a GEMM has added to the parameter's main_grad; the gradient that it
    hands out then is a stand-in.
    """
    return bool(getattr(parameter, "grad_added_to_main_grad", False))


class ExpertsFunction(torch.autograd.Function):
    """Run.forward() and Run.backward() as a node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, run: Run, hidden: torch.Tensor, probs: torch.Tensor, *_parameters: torch.Tensor
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


def _wait(result: Any) -> Any:
    result.event.current_stream_wait()
    return result


def _or_zeros(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if grad is None else grad.contiguous()
