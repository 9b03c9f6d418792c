"""The rates at which all GPUs copy at once: what everything else is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ep_kernels.bench.cuda_timing import Stopwatch

COPY_BYTES = 256 << 20
NUM_COPIES = 8


def memory_rate(stopwatch: Stopwatch, device: torch.device, ranks_per_gpu: int) -> float:
    """Bytes that one GPU reads and writes per second while every rank copies in its memory."""
    src, dst = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        for _ in range(NUM_COPIES):
            dst.copy_(src)

    seconds = stopwatch.time(copy).events.median
    return ranks_per_gpu * NUM_COPIES * 2 * COPY_BYTES / seconds


def link_rate(
    stopwatch: Stopwatch, gpu: int, num_gpus: int, ranks_per_gpu: int
) -> tuple[float, str]:
    """Bytes that one GPU sends per second while all send, and which copies were the fastest.

    Every rank copies to the next GPU, so that each one sends to one and receives from one; then a
    part to each of the others at once.
    """
    ways = {"to the next GPU": [(gpu + 1) % num_gpus]}
    if num_gpus > 2:
        ways["to all other GPUs"] = [(gpu + step) % num_gpus for step in range(1, num_gpus)]
    rates = {}
    for name, peers in ways.items():
        seconds = stopwatch.time(_copies_to(gpu, peers)).events.median
        num_bytes = len(peers) * (COPY_BYTES // len(peers))
        rates[name] = ranks_per_gpu * NUM_COPIES * num_bytes / seconds
    best = max(rates, key=lambda name: rates[name])
    return rates[best], best


def _copies_to(gpu: int, peers: list[int]) -> Callable[[], None]:
    """A function that copies COPY_BYTES, a part to each of the peers, each on a stream."""
    part = COPY_BYTES // len(peers)
    src = torch.empty(part, dtype=torch.uint8, device=f"cuda:{gpu}")
    parts = [torch.empty(part, dtype=torch.uint8, device=f"cuda:{peer}") for peer in peers]
    streams = [torch.cuda.Stream(device=f"cuda:{gpu}") for _ in peers]

    def copy() -> None:
        current = torch.cuda.current_stream()
        for stream, dst in zip(streams, parts, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(NUM_COPIES):
                    dst.copy_(src, non_blocking=True)
        for stream in streams:
            current.wait_stream(stream)

    return copy
