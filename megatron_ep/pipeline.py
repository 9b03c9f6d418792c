"""The order in which chunks of a micro-batch are sent, computed and sent back.

With n chunks, two dispatches ahead of the experts:

    transfers   D0 D1  D2 C0  D3 C1  C2     C3      D dispatch, C combine
    experts        E0     E1     E2     E3
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch


class CallStream:
    """Has transfers wait for what they need, and for nothing else.

    A call of a buffer waits for all work that the stream it is called from was given. Called from
    that of the experts, a dispatch would wait for the experts that it is to overlap with. So it is
    called from a stream of its own, which waits for the current stream when follow() says so:

        calls.follow()                     the inputs of all chunks are there
        with calls: sent = dispatch(...)   waits for no experts
        compute(...)
        with calls: dispatch(...)          nor this one
        calls.follow()
        with calls: combine(...)           for these

    Between two follow() the current stream may be given only what uses memory of the buffer that is
    still referred to: a buffer counts on memory that is freed inside of the block being used by
    nothing later than follow().

    On the CPU, where work is done when it is given, there is nothing to wait for.

    Args:
        device: of the rows.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream_of(device) if device.type == "cuda" else None
        self._scope: contextlib.AbstractContextManager[object] = contextlib.nullcontext()

    def follow(self) -> None:
        """Later calls wait for what the current stream was given until now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def join(self) -> None:
        """All calls were made. A CUDA graph that is being captured needs to see its streams end."""
        if self._stream is not None and torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def __enter__(self) -> None:
        if self._stream is not None:
            self._scope = torch.cuda.stream(self._stream)
        self._scope.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self._scope.__exit__(None, None, None)


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all layers: their transfers run one after the other in any case."""
    return torch.cuda.Stream(device, priority=-1)  # few blocks that peers wait for go first


def run_pipeline(
    dispatches: Iterator[Any],
    compute: Callable[[Any], tuple[Any, ...]],
    send_back: Callable[..., Any],
    *,
    calls: CallStream,
    finish: Callable[[], None] | None = None,
) -> list[Any]:
    """Runs the chunks through their three steps, in the order above.

    Args:
        dispatches: starts a transfer at each step.
        compute: what a dispatch gave -> what send_back() takes.
        send_back: starts a combine.
        calls: where transfers are called from.
        finish: what is left to compute of a chunk when its send_back() is under way.

    Returns:
        What send_back() gave, of each chunk.
    """
    results = []
    calls.follow()
    with calls:
        under_way = deque(islice(dispatches, 2))
    while under_way:
        # NOTE: kept until the next chunk, since transfers wait for work before memory is freed.
        arrived = under_way.popleft()
        computed = compute(arrived)
        with calls:
            under_way.extend(islice(dispatches, 1))
        calls.follow()
        with calls:
            results.append(send_back(*computed))
        if finish is not None:
            finish()
    calls.join()
    return results
