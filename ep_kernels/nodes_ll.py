"""Low-latency calls of CPU ranks on several nodes: what `cpu_ll.py` is on one.

Rows go straight from the source to the rank of the expert and back, as messages; where they lie,
and their bits, are those of one large node.

    dispatch, send half     headers to and from all ranks: counts
                            cast each token; its rows, by destination, expert and token
    dispatch, receive half  rows of each source -> behind those of the sources before it
    combine, send half      headers; rows of each source, in the order in which they came
    combine, receive half   rows of each expert's rank, weighted and added in the order of choices
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ep_kernels._native_ll import (
    RECEIVE_ASYNC,
    RECEIVE_LATER,
    RECEIVE_NOW,
    LlCombineArgs,
    LlDispatchArgs,
    LlSizes,
    half_offsets,
    region_bytes,
)
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.call_queue import CallQueue
from ep_kernels.config import Settings
from ep_kernels.cpu_backend import tensor_at
from ep_kernels.errors import EPConfigError
from ep_kernels.event import Event
from ep_kernels.lanes import Transfer
from ep_kernels.ll_checks import BF16, FP8_ROUNDED, FP8_UE8M0
from ep_kernels.ll_exchange import (
    BARRIER,
    COMBINE,
    DISPATCH,
    REFUSED,
    Header,
    LlExchange,
    check_with,
)
from ep_kernels.node_calls import NodeCalls
from ep_kernels.reference.ll import fp8_cast
from ep_kernels.topology import Topology

SCALE_GROUP = 128
HALF_ALIGNMENT = 128


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where experts live: [E] int64 each."""

    rank_of: torch.Tensor
    local_of: torch.Tensor

    @staticmethod
    def of(expert_to_rank: Sequence[int]) -> Placed:
        rank_of = torch.tensor(expert_to_rank, dtype=torch.int64)
        seen: dict[int, int] = {}
        local_of = []
        for rank in expert_to_rank:
            local_of.append(seen.get(rank, 0))
            seen[rank] = seen.get(rank, 0) + 1
        return Placed(rank_of=rank_of, local_of=torch.tensor(local_of, dtype=torch.int64))

    def experts_of(self, rank: int) -> torch.Tensor:
        return torch.nonzero(self.rank_of == rank).flatten()

    def order_of(self, experts: torch.Tensor) -> torch.Tensor:
        """Numbers that ascend by rank, then by the rank's experts."""
        return self.rank_of[experts] * len(self.rank_of) + self.local_of[experts]

    @property
    def num_local_experts(self) -> int:
        """Of the rank that has most."""
        return int(self.rank_of.bincount().max())


@dataclass(kw_only=True)
class _Dispatch:
    """A dispatch whose rows may be alive.

    Attributes:
        at: its half, an offset of the region.
        sizes: of the call.
        order: [C] the choices that are sent, by destination rank, expert and token; choice i is
            number i % K of token i // K.
        num_sent: [R] how many of them go to each rank.
        counts: [L, R] int32, rows of each local expert from each rank.
        arriving: rows of each source, by rank, as they are on their way.
        own: those of this rank.
        is_combined: a combine has begun.
    """

    at: int
    sizes: LlSizes
    order: torch.Tensor
    num_sent: torch.Tensor
    counts: torch.Tensor
    arriving: dict[int, Transfer | None] = field(default_factory=dict)
    own: torch.Tensor | None = None
    is_combined: bool = False

    @property
    def row_bytes(self) -> int:
        return int(self.sizes.hidden) * (2 if self.sizes.format == BF16 else 1)

    @property
    def scale_bytes(self) -> int:
        if self.sizes.format == BF16:
            return 0
        return int(self.sizes.hidden) // SCALE_GROUP * (1 if self.sizes.format == FP8_UE8M0 else 4)

    def rows_from(self, source: int) -> torch.Tensor:
        """Rows [N] in the blocks [L * R * M] of this rank's experts, those from `source`, in the
        order in which they travel."""
        most = self.counts.shape[1] * self.sizes.num_max_tokens_per_rank
        counts = self.counts.long()
        begins = counts.cumsum(1) - counts + torch.arange(len(counts))[:, None] * most
        return _ranges(begins[:, source], counts[:, source])


class NodesLowLatency:
    """One rank's low-latency region; calls run one after the other, on the caller's thread or
    behind asynchronous ones on a queue's.

    Args:
        exchange: with all ranks; it is closed with the region.
        barrier: of the buffer's other calls.
        expert_to_rank: [E].
        num_bytes: of the region.

    Raises:
        EPConfigError: num_bytes is too small for any call.
    """

    def __init__(
        self,
        exchange: LlExchange,
        barrier: Callable[[], None],
        expert_to_rank: Sequence[int],
        num_bytes: int,
    ) -> None:
        self._exchange, self._placed = exchange, Placed.of(expert_to_rank)
        self._barrier = barrier
        self._num_ranks, self._rank = exchange.num_ranks, exchange.rank
        self._experts = self._placed.experts_of(self._rank)
        if num_bytes < self._needed(LlSizes(num_max_tokens_per_rank=1, hidden=8)):
            raise EPConfigError(f"low_latency_bytes={num_bytes} leaves no room for rows")
        self._region = torch.empty(num_bytes, dtype=torch.uint8)
        self._halves = (0, num_bytes // 2 // HALF_ALIGNMENT * HALF_ALIGNMENT)
        self._queue = CallQueue()
        self._num_calls = 0
        self._alive: dict[int, _Dispatch] = {}
        self._receives: dict[int, Callable[[], None]] = {}  # halves that hooks run
        self._is_closed = False

    # Region

    def choose_num_sms(self, wanted: int | None, *, default: int) -> int:
        return wanted or default

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        return self._region[offset : offset + num_bytes].view(dtype).view(shape)

    def dispatch(
        self, args: LlDispatchArgs, receive: int, *, keep: Any
    ) -> tuple[int, int, Event | None]:
        """Number of the call, half of its rows, and the event of an asynchronous call."""
        self._follow_earlier()
        with self._refusing():
            check_with("dispatch", args, len(self._placed.rank_of))
            self._check_fits(args.sizes)
            at = self._free_half()
        seq = self._next()
        made = self._plan(args, at)
        self._alive[seq] = made

        def send() -> None:
            try:
                self._send_rows(seq, args, made)
            except BaseException:
                self._alive.pop(seq, None)
                raise

        def take() -> None:
            self._take_rows(args, made)

        return seq, at, self._run(seq, send, take, receive, keep)

    def combine(self, args: LlCombineArgs, receive: int, *, keep: Any) -> tuple[int, Event | None]:
        """Number of the call, and the event of an asynchronous call."""
        self._follow_earlier()
        with self._refusing():
            made = self._alive.get(args.dispatch)
            if made is None:
                raise EPConfigError(
                    f"handle (of low-latency dispatch {args.dispatch}) was combined already: its "
                    "rows are gone"
                )
            if made.is_combined:
                raise EPConfigError(
                    f"handle (of low-latency dispatch {args.dispatch}) is being combined already"
                )
            if args.dispatch in self._receives:
                raise EPConfigError(
                    f"handle (of low-latency dispatch {args.dispatch}): run the hook of its "
                    "dispatch first"
                )
            check_with("combine", args, made.sizes)
        seq = self._next()
        arriving: dict[int, Transfer | None] = {}
        own: list[torch.Tensor] = []

        def send() -> None:
            self._announce(seq, Header(op=COMBINE, dispatch=args.dispatch, wire=args.wire))
            made.is_combined = True
            own.append(self._return_rows(seq, args, made, arriving))

        def add() -> None:
            self._add_rows(args, made, own[0], arriving)
            self._alive.pop(args.dispatch, None)

        return seq, self._run(seq, send, add, receive, keep)

    def receive(self, number: int, *, keep: Any) -> None:
        self._check_usable()
        half = self._receives.get(number)
        if half is not None:
            self._queue.run(half)

    def release(self, dispatch: int) -> None:
        """The handle is gone."""
        made = self._alive.get(dispatch)
        if made is None or made.is_combined or self._is_closed:
            return
        del self._alive[dispatch]
        if self._receives.pop(dispatch, None) is not None:
            self._exchange.abandon(made.arriving.values())

    def barrier(self) -> None:
        self._check_usable()
        seq = self._next()

        def announce() -> None:
            self._announce(seq, Header(op=BARRIER))

        self._queue.run(announce)
        self._barrier()

    def refuse(self, reason: str) -> None:
        """Takes part in a call that this rank rejects."""
        self._check_usable()
        seq = self._next()

        def announce() -> None:
            with contextlib.suppress(EPConfigError):  # what this rank refuses
                self._announce(seq, Header(op=REFUSED, text=reason))

        self._queue.run(announce)

    def mask(self, rank: int) -> None:
        raise EPConfigError(f"rank={rank}: ranks can be masked within one node only")

    def unmask(self, rank: int) -> None:
        """Nobody is masked."""
        self._check_usable()

    def query_mask(self, num_ranks: int) -> torch.Tensor:
        self._check_usable()
        return torch.zeros(num_ranks, dtype=torch.bool)

    def close(self) -> None:
        """Waits for calls under way; none can be made any more."""
        if not self._is_closed:
            self._is_closed = True
            self._queue.drain()
            self._exchange.close()

    # How calls run

    def _check_usable(self) -> None:
        if self._is_closed:
            raise EPConfigError("this buffer was destroyed and cannot be used any more")
        self._exchange.check_usable()

    def _follow_earlier(self) -> None:
        """Waits for calls under way, as the send half would, and with them for their halves."""
        self._check_usable()
        self._queue.drain()

    def _next(self) -> int:
        self._num_calls += 1
        return self._num_calls - 1

    def _announce(self, seq: int, header: Header) -> list[Header]:
        """Begins a call, and with it the count of its waits."""
        self._exchange.waited_us.zero_()
        return self._exchange.announce(seq, header)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except EPConfigError as error:
            self.refuse(str(error))
            raise

    def _run(
        self,
        seq: int,
        send: Callable[[], None],
        take: Callable[[], None],
        receive: int,
        keep: Any,
    ) -> Event | None:
        """Runs the send half, and the other one when it is to run."""
        kept = [keep]

        def take_once() -> None:
            self._receives.pop(seq, None)
            try:
                take()
                self._exchange.finish()
            finally:
                kept.clear()

        def send_after_older() -> None:
            for number in [each for each in self._receives if each <= seq - 2]:
                self._receives[number]()  # its hook comes too late, or never
            send()

        try:
            self._queue.run(send_after_older)
        except BaseException:
            kept.clear()
            raise
        if receive == RECEIVE_NOW:
            self._queue.run(take_once)
        elif receive == RECEIVE_ASYNC:
            return Event(self._queue.submit(take_once))
        else:
            assert receive == RECEIVE_LATER
            self._receives[seq] = take_once
        return None

    def _needed(self, sizes: LlSizes) -> int:
        """Bytes of a region for calls of these sizes; as on one node."""
        num_experts, num_local = len(self._placed.rank_of), self._placed.num_local_experts
        return region_bytes(sizes, self._num_ranks, num_experts, num_local)

    def _check_fits(self, sizes: LlSizes) -> None:
        needed = self._needed(sizes)
        if needed > len(self._region):
            raise EPConfigError(
                f"low_latency_bytes={len(self._region)} is too small: num_max_tokens_per_rank="
                f"{sizes.num_max_tokens_per_rank} and hidden={sizes.hidden} need {needed}"
            )

    def _free_half(self) -> int:
        taken = {made.at: number for number, made in self._alive.items()}
        for at in self._halves:
            if at not in taken:
                return at
        first, second = (taken[at] for at in self._halves)
        raise EPConfigError(
            "two low-latency results are alive, the limit: combine, or let go of, that of call "
            f"{first} or {second}"
        )

    # Dispatch

    def _plan(self, args: LlDispatchArgs, at: int) -> _Dispatch:
        sizes = LlSizes.from_buffer_copy(args.sizes)
        topk_idx = _choices(args.topk_idx, sizes, torch.int64).flatten()
        chosen = torch.nonzero(topk_idx >= 0).flatten()
        experts = topk_idx[chosen]
        ranks = self._placed.rank_of[experts]
        place = self._placed.order_of(experts)
        return _Dispatch(
            at=at,
            sizes=sizes,
            order=chosen[place.argsort(stable=True)],
            num_sent=ranks.bincount(minlength=self._num_ranks),
            counts=torch.zeros(len(self._experts), self._num_ranks, dtype=torch.int32),
        )

    def _send_rows(self, seq: int, args: LlDispatchArgs, made: _Dispatch) -> None:
        sizes, exchange = made.sizes, self._exchange
        topk_idx = _choices(args.topk_idx, sizes, torch.int64)
        counts = topk_idx[topk_idx >= 0].bincount(minlength=len(self._placed.rank_of)).int()
        headers = self._announce(
            seq,
            Header(
                op=DISPATCH,
                num_max_tokens_per_rank=sizes.num_max_tokens_per_rank,
                hidden=sizes.hidden,
                format=sizes.format,
                counts=counts,
            ),
        )
        of_all = torch.stack([_counts(header) for header in headers])
        made.counts = of_all[:, self._experts].t().contiguous()
        before = of_all[: self._rank].sum(0)
        self._number_rows(args, made, before)
        row_bytes = made.row_bytes + made.scale_bytes
        for peer in exchange.peers:
            num_bytes = int(made.counts[:, peer].sum()) * row_bytes
            made.arriving[peer] = exchange.receive(seq, peer, num_bytes)
        rows, scales = _cast(args, sizes)
        tokens = (made.order // sizes.num_topk).split(made.num_sent.tolist())
        for rank, sent in enumerate(tokens):
            payload = _pack(rows[sent], None if scales is None else scales[sent])
            if rank == self._rank:
                made.own = payload
            else:
                exchange.send(seq, rank, payload)

    def _number_rows(self, args: LlDispatchArgs, made: _Dispatch, before: torch.Tensor) -> None:
        """The handle's routing: the row of each choice in its expert's block, behind those of the
        ranks `before` this one, [E]."""
        topk_idx = _choices(args.topk_idx, made.sizes, torch.int64).flatten()
        sent = topk_idx[made.order]
        place = self._placed.order_of(sent)  # ascending
        own_rows = torch.arange(len(sent)) - torch.searchsorted(place, place)
        _choices(args.experts, made.sizes, torch.int32).flatten().copy_(topk_idx)
        rows = _choices(args.rows, made.sizes, torch.int32).flatten().fill_(-1)
        rows[made.order] = (before[sent] + own_rows).int()

    def _take_rows(self, args: LlDispatchArgs, made: _Dispatch) -> None:
        sizes, num_local = made.sizes, len(self._experts)
        num_rows = self._num_ranks * sizes.num_max_tokens_per_rank
        x, scales, _ = half_offsets(sizes, self._num_ranks, num_local)
        recv_x = self.view(made.at + x, (num_local * num_rows, made.row_bytes), torch.uint8)
        num_scales = made.scale_bytes // 4
        recv_scales = self.view(
            made.at + scales, (num_local, num_scales, num_rows), torch.int32
        ).transpose(1, 2)
        for source in range(self._num_ranks):
            payload = self._payload(source, made.own, made.arriving)
            to = made.rows_from(source)
            rows = payload[: len(to) * made.row_bytes].view(len(to), made.row_bytes)
            recv_x[to] = rows
            if num_scales > 0:
                words = payload[rows.numel() :].view(torch.int32).view(len(to), num_scales)
                recv_scales[to // num_rows, to % num_rows] = words
        counts = made.counts
        tensor_at(args.recv_rank_counts, tuple(counts.shape), torch.int32).copy_(counts)
        tensor_at(args.recv_count, (num_local,), torch.int32).copy_(counts.sum(1))
        tensor_at(args.missing, (self._num_ranks,), torch.bool).zero_()
        if args.cumulative_recv_stats:
            dtype = torch.int64 if args.cumulative_stats_bytes == 8 else torch.int32
            tensor_at(args.cumulative_recv_stats, (num_local,), dtype).add_(counts.sum(1))
        self._tell_waits(args.wait_recv_cost_stats)
        made.own, made.arriving = None, {}

    def _payload(
        self, source: int, own: torch.Tensor | None, arriving: dict[int, Transfer | None]
    ) -> torch.Tensor:
        """What a rank has sent."""
        if source == self._rank:
            assert own is not None
            return own
        transfer = arriving[source]
        if transfer is None:
            return torch.empty(0, dtype=torch.uint8)
        self._exchange.wait(transfer)
        return transfer.tensor

    def _tell_waits(self, address: int | None) -> None:
        if address:
            tensor_at(address, (self._num_ranks,), torch.int64).add_(self._exchange.waited_us)

    # Combine

    def _return_rows(
        self, seq: int, args: LlCombineArgs, made: _Dispatch, arriving: dict[int, Transfer | None]
    ) -> torch.Tensor:
        """Sends the rows of each source back; those of this rank are returned."""
        exchange, sizes = self._exchange, made.sizes
        is_compressed = args.wire != 0
        row_bytes = _wire_bytes(sizes.hidden, is_compressed)
        for peer in exchange.peers:
            num_bytes = int(made.num_sent[peer]) * row_bytes
            arriving[peer] = exchange.receive(seq, peer, num_bytes)
        num_rows = len(self._experts) * self._num_ranks * sizes.num_max_tokens_per_rank
        x = tensor_at(args.x, (num_rows, sizes.hidden), torch.bfloat16)
        own = torch.empty(0, dtype=torch.uint8)
        for source in range(self._num_ranks):
            rows = x[made.rows_from(source)]
            payload = _pack(*fp8_cast(rows)) if is_compressed else _pack(rows, None)
            if source == self._rank:
                own = payload
            else:
                exchange.send(seq, source, payload)
        return own

    def _add_rows(
        self,
        args: LlCombineArgs,
        made: _Dispatch,
        own: torch.Tensor,
        arriving: dict[int, Transfer | None],
    ) -> None:
        """fp32, from +0, in the order of choices: the product is rounded, then the sum."""
        sizes, is_compressed = made.sizes, args.wire != 0
        num_tokens, num_topk, hidden = sizes.num_tokens, sizes.num_topk, sizes.hidden
        weights = _choices(args.topk_weights, sizes, torch.float32)
        dtype = torch.float32 if is_compressed else torch.bfloat16
        rows = torch.empty(num_tokens * num_topk, hidden, dtype=dtype)
        for owner, sent in enumerate(made.order.split(made.num_sent.tolist())):
            payload = self._payload(owner, own, arriving)
            rows[sent] = _unpack(payload, len(sent), hidden, is_compressed=is_compressed)
        is_sent = torch.zeros(num_tokens * num_topk, dtype=torch.bool)
        is_sent[made.order] = True
        is_sent, rows = is_sent.view(num_tokens, num_topk), rows.view(num_tokens, num_topk, hidden)
        total = torch.zeros(num_tokens, hidden)
        for k in range(num_topk):
            # NOTE: two operations, or torch might make one rounding of them.
            if is_sent[:, k].all():
                total += weights[:, k, None] * rows[:, k].float()
            else:
                tokens = torch.nonzero(is_sent[:, k]).flatten()
                total[tokens] += weights[tokens, k, None] * rows[tokens, k].float()
        out = tensor_at(args.out, (num_tokens, hidden), torch.bfloat16)
        out.copy_(total.bfloat16().masked_fill_(total.isnan(), float("nan")))
        tensor_at(args.missing, (self._num_ranks,), torch.bool).zero_()
        self._tell_waits(args.wait_recv_cost_stats)


def make_region_over_nodes(
    backend: NodeCalls, bootstrap: Bootstrap, settings: Settings, topology: Topology
) -> NodesLowLatency:
    """Connects all ranks; the region goes with the backend. Collective.

    Raises:
        EPConfigError, EPDeviceError: on all ranks.
    """
    exchange = LlExchange(
        bootstrap, topology, settings.num_experts, settings.timeout_s, backend.lose
    )
    try:
        region = NodesLowLatency(
            exchange, backend.barrier, settings.expert_to_rank, settings.low_latency_bytes
        )
    except BaseException:
        exchange.close()
        raise
    backend.when_destroyed(region.close)
    return region


def _choices(address: int, sizes: LlSizes, dtype: torch.dtype) -> torch.Tensor:
    """[T, K] at an address."""
    return tensor_at(address, (sizes.num_tokens, sizes.num_topk), dtype)


def _counts(header: Header) -> torch.Tensor:
    assert header.counts is not None
    return header.counts


def _ranges(begins: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """begins[0], begins[0] + 1, ... counts[0] of them, then those of the next.

    Example: begins 3, 10; counts 2, 1 -> 3, 4, 10.
    """
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + (begins - before).repeat_interleave(counts)


def _cast(args: LlDispatchArgs, sizes: LlSizes) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and scales of all tokens, as they travel."""
    x = tensor_at(args.x, (sizes.num_tokens, sizes.hidden), torch.bfloat16)
    if sizes.format == BF16:
        return x, None
    return fp8_cast(
        x,
        round_scale=sizes.format in (FP8_ROUNDED, FP8_UE8M0),
        use_ue8m0=sizes.format == FP8_UE8M0,
    )


def _pack(rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Rows, then their scales, as bytes."""
    parts = [rows.contiguous().view(torch.uint8).flatten()]
    if scales is not None:
        parts.append(scales.contiguous().view(torch.uint8).flatten())
    return torch.cat(parts)


def _wire_bytes(hidden: int, is_compressed: bool) -> int:
    """Of a row of a combine."""
    return hidden + hidden // SCALE_GROUP * 4 if is_compressed else 2 * hidden


def _unpack(
    payload: torch.Tensor, num_rows: int, hidden: int, *, is_compressed: bool
) -> torch.Tensor:
    """[N, H] of what _pack() made of the rows of a combine: bfloat16, or float32 if compressed."""
    if not is_compressed:
        return payload.view(torch.bfloat16).view(num_rows, hidden)
    elements, scales = payload.split([num_rows * hidden, len(payload) - num_rows * hidden])
    num_groups = hidden // SCALE_GROUP
    groups = elements.view(torch.float8_e4m3fn).view(num_rows, num_groups, SCALE_GROUP).float()
    return (groups * scales.view(torch.float32).view(num_rows, num_groups, 1)).flatten(1)
