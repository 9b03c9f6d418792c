"""Moments that calls on a GPU come to, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist


def describe(stamps: torch.Tensor, names: Sequence[str]) -> Iterator[str]:
    """A line for each step that calls come to: of each the medians over the calls in microseconds,
    since the first rank began the call, of the first, the middle and the last rank to come there;
    and since each rank's own begin.

    Args:
        stamps: [R, N, len(names)] nanoseconds of N calls of one kind, oldest first; 0: never.
        names: of the steps. The first is when a call begins.
    """
    times = stamps.double() / 1e3
    begin = times[:, :, 0]
    since_first = times - begin.min(dim=0).values[None, :, None]
    since_own = times - begin[:, :, None]
    for i, name in enumerate(names):
        if not stamps[:, :, i].any():
            continue
        here = since_first[:, :, i]
        of_ranks = [here.min(0).values, here.median(0).values, here.max(0).values]
        first, middle, last = (float(each.median()) for each in of_ranks)
        own = float(since_own[:, :, i].median())
        yield f"  {name:10} {first:7.1f} {middle:7.1f} {last:7.1f}   own {own:7.1f}"


def gather_stamps(own: torch.Tensor) -> torch.Tensor:
    """[R, ...] of what each rank has. Collective."""
    gathered = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return torch.stack(gathered)
