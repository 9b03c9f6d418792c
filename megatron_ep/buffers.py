"""The buffers behind the token dispatchers: one per process group, shared by all layers.

configure()       what layers and buffers made from now on are like
get_buffer()      the buffer of a group, made when first asked for
reset_buffers()   ends all buffers, before their process groups end
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from megatron_ep.overlap import check_num_chunks
from megatron_ep.trace import TracedBuffer, active_tracer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of layers, and of the buffers that get_buffer() makes, where None is ep_kernels' own
    default.

    Attributes:
        num_chunks: chunks of a micro-batch whose transfers overlap with the experts of others, see
            overlap.py; 1 for none, "auto" for a choice by times, see choose_chunks.py.
        overlap_num_sms: SMs (threads on the CPU) of each transfer of chunks that overlaps with
            experts, which leave them free, see free_sms.py. None: num_sms, and the experts' GEMMs
            take all SMs.
        overlap_weight_gradients: in the backward the gradients of tokens travel back while those of
            the experts' weights are computed, with one chunk, too; needs experts "torch".
        recompute_transfers: where Megatron runs a layer's forward again, in the backward, also
            communicate again: in less memory, in more time; see recompute.py.
        fp8_dispatch: rows travel to the experts as fp8, see fp8_rows.py.
        results_in_pool: the experts' last GEMM writes into the pool, see expert_memory.py.
        num_sms: worker threads (CPU) or SMs (GPU) of each transfer.
        timeout_s: how long a rank waits for a silent peer.
        pool_bytes: limit of the memory for results on this rank.
        num_local_ranks: ranks per node.
        staging_bytes: limit of the memory for rows on their way between nodes.
        experts: of the layers, "torch" (experts.py) or "auto": those of the layer's specification.
        capacity_factor: a dispatch has room for so many times the rows that this rank sends, which
            is the average of what ranks get where all have as many tokens. The host then never
            waits for a layer, and rows that find no room are lost; needs experts "torch". None:
            room for all rows, for whose number the host waits.
        buffer_class: called as ep_kernels.Buffer is (None: that one), for instance
            ep_kernels.reference.Buffer.
    """

    num_chunks: int | str = 1
    overlap_num_sms: int | None = None
    overlap_weight_gradients: bool = False
    recompute_transfers: bool = False
    fp8_dispatch: bool = False
    results_in_pool: bool = False
    num_sms: int | None = None
    timeout_s: float | None = None
    pool_bytes: int | None = None
    num_local_ranks: int | None = None
    staging_bytes: int | None = None
    experts: str = "auto"
    capacity_factor: float | None = None
    buffer_class: Callable[..., Any] | None = None


_OF_LAYERS = (
    "num_chunks",
    "overlap_num_sms",
    "overlap_weight_gradients",
    "recompute_transfers",
    "fp8_dispatch",
    "results_in_pool",
    "experts",
    "capacity_factor",
)

EXPERTS = ("auto", "torch")

_options = Options()
_buffers: dict[tuple[Any, int, str], Any] = {}


def configure(**changes: Any) -> Options:
    """Changes the options of layers and buffers that are made from now on.

    Args:
        **changes: fields of Options.

    Returns:
        The options before, so that `configure(**vars(before))` restores them.

    Raises:
        TypeError: an unknown option.
        ValueError: a value that is none.

    Example:
        >>> before = configure(num_sms=4, timeout_s=120.0)
    """
    global _options
    known = [field.name for field in fields(Options)]
    for name in changes:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; the options are {', '.join(known)}")
    if "num_chunks" in changes:
        check_num_chunks(changes["num_chunks"])
    if changes.get("experts", "auto") not in EXPERTS:
        raise ValueError(f"experts={changes['experts']!r} is none of {', '.join(EXPERTS)}")
    check_capacity_factor(changes.get("capacity_factor"))
    before, _options = _options, replace(_options, **changes)
    return before


def check_capacity_factor(factor: Any) -> None:
    """Raises ValueError unless it is a positive number or None."""
    is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    if factor is not None and not (is_number and 0 < factor < float("inf")):
        raise ValueError(f"capacity_factor={factor!r} is neither a positive number nor None")


def current_options() -> Options:
    """What configure() has set."""
    return _options


def get_buffer(
    group: Any,
    *,
    num_experts: int,
    expert_to_rank: torch.Tensor | None,
    device: torch.device,
) -> Any:
    """The buffer of (group, num_experts, device); collective over the group when it is made.

    Args:
        group: the torch.distributed process group.
        num_experts: in the whole group.
        expert_to_rank: [num_experts] int64 or None, see ep_kernels.Buffer; determined by the group
            and num_experts.
        device: where rows live.
    """
    key = (group, num_experts, str(device))
    if key not in _buffers:
        options = {name: value for name, value in vars(_options).items() if value is not None}
        buffer_class = options.pop("buffer_class", None)
        for of_layers in _OF_LAYERS:
            options.pop(of_layers, None)
        if buffer_class is None:
            from ep_kernels import Buffer as buffer_class
        buffer = buffer_class(
            group, num_experts=num_experts, expert_to_rank=expert_to_rank, device=device, **options
        )
        tracer = active_tracer()
        _buffers[key] = TracedBuffer(buffer, tracer) if tracer else buffer
    return _buffers[key]


@atexit.register
def reset_buffers() -> None:
    """Destroys all buffers; the next use of a group makes a new one. Needs no partner."""
    while _buffers:
        _, buffer = _buffers.popitem()
        buffer.destroy()
