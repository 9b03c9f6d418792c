"""What travelled in a forward, kept for the same forward again: activation recomputation without a
second communication.

    forward           dispatch, experts, combine    nothing of the experts is saved
    forward again     rows, experts, sum            in the backward: rows and sum are the kept ones
    backward          dispatch, experts, combine    of gradients

Whoever recomputes calls the same function twice. keep_transfers() puts an object around it that
lives as long as the function does, that is as long as the graph of its output: each MoE layer under
the function leaves its transfers there in the first call, and takes them away in the second. So any
number of micro-batches may be in flight, and a graph that is dropped lets go of all that was kept.

A call that finds nothing kept communicates, as a third one does (backward(retain_graph=True)); so
all ranks have to recompute the same layers. Layers in chunks do so under torch's checkpoint with
use_reentrant=False, which calls the function once for each chunk.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ep_kernels import CombineResult, DispatchResult
from ep_kernels.event import Event


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfers:
    """Of one micro-batch through one layer.

    Attributes:
        owner: the layer's dispatcher.
        topk_idx: [T, K] the routing.
        sent: what dispatch delivered, of each chunk.
        combined: what combine gave, [T, H].
    """

    owner: Any
    topk_idx: torch.Tensor
    sent: tuple[DispatchResult, ...]
    combined: CombineResult


class _Running(threading.local):
    """Functions of keep_transfers() that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.functions: list[_Keeper] = []


_running = _Running()


class _Keeper:
    """Calls a function; what layers keep in its first call is there in later ones."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._transfers: list[Transfers] = []
        self.is_first_call = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _running.functions.append(self)
        try:
            return self._function(*args, **kwargs)
        finally:
            _running.functions.pop()
            self.is_first_call = False

    def add(self, transfers: Transfers) -> None:
        self._transfers.append(transfers)

    def find(self, owner: Any) -> Transfers | None:
        """The oldest that the owner kept in an earlier call."""
        if self.is_first_call:
            return None
        return next((one for one in self._transfers if one.owner is owner), None)

    def remove(self, transfers: Transfers) -> None:
        self._transfers = [one for one in self._transfers if one is not transfers]


def keep_transfers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function for checkpointing, whose second call takes the transfers of the first.

    Args:
        function: is called in the forward, and again in the backward with the same inputs.

    Example:
        >>> y = torch.utils.checkpoint.checkpoint(keep_transfers(layer), x, use_reentrant=True)
    """
    return _Keeper(function) if torch.is_grad_enabled() else function


def may_run_again() -> bool:
    """Whether this forward is the first call of a function of keep_transfers()."""
    return any(keeper.is_first_call for keeper in _running.functions)


def kept_transfers(owner: Any) -> Transfers | None:
    """What the owner has to take in this forward in place of communicating; None to communicate."""
    found = (keeper.find(owner) for keeper in reversed(_running.functions))
    return next((one for one in found if one is not None), None)


def take_transfers(owner: Any) -> Transfers | None:
    """kept_transfers(), which are then kept no longer."""
    transfers = kept_transfers(owner)
    if transfers is not None:
        for keeper in _running.functions:
            keeper.remove(transfers)
        keep(transfers)
    return transfers


def keep(transfers: Transfers) -> None:
    """Leaves transfers with every function that this forward is the first call of."""
    combined = CombineResult(x=transfers.combined.x.detach(), topk_weights=None, event=Event())
    sent = tuple(map(_without_graph, transfers.sent))
    for keeper in _running.functions:
        if keeper.is_first_call:
            keeper.add(replace(transfers, sent=sent, combined=combined))


def wrap_checkpoint(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A function `checkpoint(function, ...)` whose functions keep their transfers."""

    @functools.wraps(checkpoint)
    def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(keep_transfers(function), *args, **kwargs)

    return wrapped


def _without_graph(sent: DispatchResult) -> DispatchResult:
    weights = sent.recv_topk_weights
    return replace(
        sent,
        recv_x=sent.recv_x.detach(),
        recv_topk_weights=None if weights is None else weights.detach(),
        event=Event(),  # who dispatched has waited for it
    )
