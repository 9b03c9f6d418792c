"""Messages of low-latency calls over several nodes: every rank with every other, in one hop.

    announce   a header of each rank to each other one: what call it makes, the rows that it sends
               to each expert; all ranks compare all of them
    send       rows, of a size that both ends know from the headers

docs/low-latency.md has the protocol.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ep_kernels import _native
from ep_kernels._native_ll import ll_library
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.errors import EPConfigError, EPTimeoutError
from ep_kernels.lanes import Lane, Message, Transfer, make_lane
from ep_kernels.topology import Topology

DISPATCH, COMBINE, BARRIER, REFUSED = 1, 2, 3, 4
"""Operations, as LlOp in `csrc/core/ll_protocol.h`."""

HEADER, ROWS = 0, 1  # kinds of messages
HEADER_PHASE, ROWS_PHASE = 2, 5
MAX_TEXT = 512


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a rank announces. All but `counts` is the same on all ranks.

    Attributes:
        op: what it does.
        num_max_tokens_per_rank, hidden, format: of a dispatch.
        dispatch, wire: of a combine: number of the dispatch; how rows travel.
        text: why, of a call that is refused.
        counts: [E] int32, rows that a dispatch sends to each expert.
    """

    op: int
    num_max_tokens_per_rank: int = 0
    hidden: int = 0
    format: int = 0
    dispatch: int = 0
    wire: int = 0
    text: str = ""
    counts: torch.Tensor | None = None


FIELDS = [
    field.name for field in dataclasses.fields(Header) if field.name not in ("text", "counts")
]
"""In the order of LlField."""


class LlExchange:
    """This rank's connections to all others, and the numbers of calls.

    Args:
        bootstrap, topology: of the group.
        num_experts: E.
        timeout_s: of each wait.
        fail: is told the error when a rank is lost, after which no call can be made.

    Raises:
        EPConfigError, EPDeviceError: as make_lane(), on all ranks.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        topology: Topology,
        num_experts: int,
        timeout_s: float,
        fail: Callable[[EPTimeoutError], None],
    ) -> None:
        self._num_experts, self._fail = num_experts, fail
        self.rank, self.num_ranks = topology.rank, topology.num_ranks
        every_rank = dataclasses.replace(topology, num_local_ranks=1)
        self.waited_us = torch.zeros(self.num_ranks, dtype=torch.int64)
        self._awaited, self._since_ns = -1, 0
        self._lane: Lane = make_lane(bootstrap, every_rank, timeout_s, self._waiting_for)
        self._lane.places = topology
        self._under_way: list[Transfer] = []  # rows that nobody waits for yet
        self._error: EPTimeoutError | None = None

    def _waiting_for(self, rank: int) -> None:
        now_ns = time.monotonic_ns()
        if self._awaited >= 0:
            self.waited_us[self._awaited] += (now_ns - self._since_ns) // 1000
        self._awaited, self._since_ns = rank, now_ns

    @property
    def peers(self) -> list[int]:
        return self._lane.topology.other_nodes

    def announce(self, seq: int, own: Header) -> list[Header]:
        """The headers of all ranks, which are about the same call.

        Raises:
            EPConfigError: on all ranks, if one refuses, or if they differ.
            EPTimeoutError: a rank is dead or silent.
        """
        message = Message(seq=seq, kind=HEADER, phase=HEADER_PHASE)
        sent = self._encode(own)
        received = {peer: torch.empty_like(sent) for peer in self.peers}
        arriving = [self._start(peer, received[peer], message) for peer in self.peers]
        leaving = [self._start(peer, sent, message, is_send=True) for peer in self.peers]
        for transfer in [*arriving, *leaving]:
            self.wait(transfer)
        self.finish()
        headers = [self._decode(received.get(rank, sent)) for rank in range(self.num_ranks)]
        self._compare(headers)
        return headers

    def send(self, seq: int, peer: int, rows: torch.Tensor) -> None:
        """Starts to send a contiguous uint8 tensor, which is kept until it has gone."""
        if rows.numel() > 0:
            message = Message(seq=seq, kind=ROWS, phase=ROWS_PHASE, is_chunk=True)
            self._under_way.append(self._start(peer, rows, message, is_send=True))

    def receive(self, seq: int, peer: int, num_bytes: int) -> Transfer | None:
        """Starts to receive rows; None if there are none."""
        if num_bytes == 0:
            return None
        message = Message(seq=seq, kind=ROWS, phase=ROWS_PHASE, is_chunk=True)
        return self._start(peer, torch.empty(num_bytes, dtype=torch.uint8), message)

    def finish(self) -> None:
        """Waits until what this rank has sent has gone. Peers receive it in the send half of the
        same call, so this waits for nobody's hook."""
        while self._under_way:
            self.wait(self._under_way.pop())

    def abandon(self, transfers: Iterable[Transfer | None]) -> None:
        """Nobody wants these rows any more; their memory is kept until they have come."""
        self._under_way += [transfer for transfer in transfers if transfer is not None]

    def wait(self, transfer: Transfer) -> None:
        """Raises EPTimeoutError, here and from now on, if the peer is lost."""
        self.check_usable()
        try:
            self._lane.wait(transfer)
        except EPTimeoutError as error:
            self._lose(error)
            raise

    def close(self) -> None:
        with contextlib.suppress(EPTimeoutError):
            self.finish()
        self._lane.close()

    def _start(
        self, peer: int, tensor: torch.Tensor, message: Message, *, is_send: bool = False
    ) -> Transfer:
        self.check_usable()
        try:
            return (self._lane.isend if is_send else self._lane.irecv)(peer, tensor, message)
        except EPTimeoutError as error:
            self._lose(error)
            raise

    def check_usable(self) -> None:
        """Raises what lost a rank."""
        if self._error is not None:
            raise self._error.with_traceback(None)

    def _lose(self, error: EPTimeoutError) -> None:
        self._error = error
        self._lane.close(self.rank if error.peer is None else error.peer)
        self._fail(error)

    def _encode(self, header: Header) -> torch.Tensor:
        words = torch.tensor([getattr(header, name) for name in FIELDS], dtype=torch.int64)
        text = torch.zeros(MAX_TEXT, dtype=torch.uint8)
        encoded = header.text.encode()[:MAX_TEXT]
        text[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        counts = header.counts
        if counts is None:
            counts = torch.zeros(self._num_experts, dtype=torch.int32)
        return torch.cat([words.view(torch.uint8), text, counts.view(torch.uint8)])

    def _decode(self, received: torch.Tensor) -> Header:
        words, text, counts = received.split([8 * len(FIELDS), MAX_TEXT, 4 * self._num_experts])
        reason = bytes(text.tolist()).rstrip(b"\0").decode(errors="replace")
        fields = dict(zip(FIELDS, words.clone().view(torch.int64).tolist(), strict=True))
        return Header(**fields, text=reason, counts=counts.clone().view(torch.int32))

    def _compare(self, headers: list[Header]) -> None:
        """The lowest finding counts, so that all ranks raise the same."""
        for rank, header in enumerate(headers):
            if header.op == REFUSED:
                raise EPConfigError(f"rank {rank} refused this call: {header.text}")
        check = ll_library().ep_ll_check_agreed
        for rank, header in enumerate(headers):
            for i, name in enumerate(FIELDS):
                here, there = getattr(headers[0], name), getattr(header, name)
                _native.call(check, i, 0, here, rank, there)


def check_with(function: str, *arguments: ctypes.Structure | int) -> None:
    """Calls ep_ll_check_<function> of the compiled core. Raises EPConfigError."""
    pointers = [each if isinstance(each, int) else ctypes.byref(each) for each in arguments]
    _native.call(getattr(ll_library(), f"ep_ll_check_{function}"), *pointers)
