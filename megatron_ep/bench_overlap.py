"""How much of a layer's communication its experts hide, and experts that could hide all of it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ep.bench_layer import PASSES, make_variants, parse_variant
from megatron_ep.trace import (
    EXPERTS,
    TRANSFERS,
    Span,
    busy_ns,
    hidden_fraction,
    start_tracing,
    stop_tracing,
    write_trace,
)

FFN_HIDDEN_STEP = 64
"""Widths that GEMMs take well."""


def trace_variant(
    options: argparse.Namespace, variant: str, device: torch.device
) -> list[list[Span]]:
    """Spans of each rank in one forward and backward, in which nothing is timed."""
    import megatron_ep

    megatron_ep.reset_buffers()
    tracer = start_tracing()
    try:
        both = make_variants(options, [variant], device)[variant].passes[PASSES[-1]]
        for _ in range(max(1, options.warmup)):
            both()
        with tracer.recording():
            both()
        spans_of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(spans_of_ranks, tracer.spans())
    finally:
        stop_tracing()
        megatron_ep.reset_buffers()
    return spans_of_ranks


def can_be_watched(variant: str) -> bool:
    """Whether the host makes the calls of the variant, and they are deepep's."""
    kind = parse_variant(variant)
    return kind.dispatcher == "deepep" and not kind.is_replayed


def report_overlap(
    options: argparse.Namespace, variants: Sequence[str], device: torch.device
) -> None:
    """For every variant of deepep prints how long transfers and experts were busy, and how much of
    the transfers is hidden; writes timelines if a file is named.
    """
    for variant in variants:
        if not can_be_watched(variant):
            continue
        spans_of_ranks = trace_variant(options, variant, device)
        if dist.get_rank() != 0:
            continue
        hidden = [round(hidden_fraction(spans) or 0.0, 3) for spans in spans_of_ranks]
        line: dict[str, Any] = {"dispatcher": variant, "hidden_of_communication": hidden}
        for track in (TRANSFERS, EXPERTS):
            line[f"{track}_ms"] = [round(busy_ns(s, track) / 1e6, 3) for s in spans_of_ranks]
        if options.trace is not None:
            line["trace"] = str(_path_of(options.trace, variant))
            write_trace(line["trace"], spans_of_ranks)
        sys.stdout.write(json.dumps(line) + "\n")


def balance(options: argparse.Namespace, device: torch.device) -> int:
    """A width of the experts with which they take about as long as the transfers, in one piece, in
    the first variant of deepep.

    Starts from options.ffn_hidden; the same on all ranks.
    """
    names = [name.partition("/")[0] for name in options.dispatchers if can_be_watched(name)]
    trial = argparse.Namespace(**vars(options))
    for _ in range(2):
        spans_of_ranks = trace_variant(trial, [*names, "deepep"][0], device)
        transfers, experts = (
            statistics.median(busy_ns(spans, track) for spans in spans_of_ranks)
            for track in (TRANSFERS, EXPERTS)
        )
        steps = round(trial.ffn_hidden * transfers / max(1, experts) / FFN_HIDDEN_STEP)
        trial.ffn_hidden = max(1, steps) * FFN_HIDDEN_STEP
    return int(trial.ffn_hidden)


def _path_of(path: Path, variant: str) -> Path:
    """Example: t.json, "deepep/2" -> t-deepep-2.json."""
    return path.with_name(f"{path.stem}-{variant.replace('/', '-')}{path.suffix}")
