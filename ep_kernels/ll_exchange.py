"""What ranks tell each other in low-latency calls over several nodes: each rank all others, in one
hop.

    announce        a header of each rank to each other one: what call it makes, the rows that it
                    sends to each expert; all ranks compare all of them
    exchange_rows   rows, of sizes that both ends know from the headers; ll_carriers.py moves them

docs/low-latency.md has the protocol.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ep_kernels import _native
from ep_kernels._native import PHASES
from ep_kernels._native_ll import ll_library
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.errors import EPConfigError, EPError, EPTimeoutError
from ep_kernels.lanes import Lane, Message, make_lane
from ep_kernels.ll_carriers import ROWS_PHASE, ArrivingRows, MakeCarrier
from ep_kernels.topology import Topology

DISPATCH, COMBINE, BARRIER, REFUSED = 1, 2, 3, 4
"""Operations, as LlOp in `csrc/core/ll_protocol.h`."""

HEADER = 0  # a kind of messages; ll_carriers.py and group_transport.py have the others
HEADER_PHASE = 2
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
        make_carrier: for rows.
        fail: is told the error when a rank is lost, after which no call can be made.

    Attributes:
        waited_us: as in Lane.

    Raises:
        EPConfigError, EPDeviceError: as make_lane() and make_carrier(), on all ranks.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        topology: Topology,
        num_experts: int,
        timeout_s: float,
        make_carrier: MakeCarrier,
        fail: Callable[[EPTimeoutError], None],
    ) -> None:
        self._num_experts, self._fail = num_experts, fail
        self.rank, self.num_ranks = topology.rank, topology.num_ranks
        every_rank = dataclasses.replace(topology, num_local_ranks=1)
        self._lane: Lane = make_lane(bootstrap, every_rank, timeout_s)
        self._lane.places = topology
        self.waited_us = self._lane.waited_us
        try:
            self._carrier = make_carrier(self._lane, bootstrap)
        except BaseException:
            self._lane.close()
            raise
        self._error: EPTimeoutError | None = None

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
        with self._losing():
            lane = self._lane
            arriving = [lane.irecv(peer, received[peer], message) for peer in self.peers]
            leaving = [lane.isend(peer, sent, message) for peer in self.peers]
            for transfer in [*arriving, *leaving]:
                lane.wait(transfer)
            self._carrier.settle()
        headers = [self._decode(received.get(rank, sent)) for rank in range(self.num_ranks)]
        self._compare(headers)
        return headers

    def exchange_rows(
        self, seq: int, sends: Mapping[int, torch.Tensor], recv_bytes: Mapping[int, int]
    ) -> ArrivingRows:
        """Starts to send rows [N] uint8 to peers, and to receive from peers. Those without rows
        may be left out."""
        with self._losing():
            return self._carrier.start(
                seq,
                {peer: rows for peer, rows in sends.items() if len(rows) > 0},
                {peer: size for peer, size in recv_bytes.items() if size > 0},
            )

    def take(self, arriving: ArrivingRows, peer: int) -> torch.Tensor | None:
        """What a peer has sent, when it is there; None for no rows."""
        with self._losing():
            return self._carrier.take(arriving, peer)

    def settle(self) -> None:
        """Waits until what this rank has sent has gone. Peers receive it in the send half of the
        same call, so this waits for nobody's hook."""
        with self._losing():
            self._carrier.settle()

    def abandon(self, arriving: ArrivingRows) -> None:
        """Nobody wants these rows any more; their memory is kept until they have come."""
        self._carrier.abandon(arriving)

    def close(self) -> None:
        with contextlib.suppress(EPError):
            self.settle()
        self._lane.close()
        self._carrier.close()

    def give_up(self, error: BaseException) -> None:
        """This rank has failed in the middle of a call: the others need not wait for it."""
        text = f"rank {self.rank}: {type(error).__name__}: {error}"
        phase = PHASES[ROWS_PHASE]
        self._lose(EPTimeoutError(text, rank=self.rank, phase=phase, peer=self.rank))

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Raises EPTimeoutError, here and from now on, if a rank is lost."""
        self.check_usable()
        try:
            yield
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
        self._carrier.close()
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
