"""Low-latency calls of ranks on several nodes: what `cpu_ll.py` and `cuda_ll.py` are on one.

Rows go straight from the source to the rank of the expert and back; where they lie, and their
bits, are those of one large node. Work on rows is in nodes_ll_rows.py, messages are in
ll_exchange.py.

    dispatch, send half     choices to the host; headers to and from all ranks: counts
                            cast each token; its rows, by destination, expert and token
    dispatch, receive half  rows of each source -> behind those of the sources before it
    combine, send half      headers; rows of each source, in the order in which they came
    combine, receive half   rows of each expert's rank, weighted and added in the order of choices
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ep_kernels._native_ll import (
    RECEIVE_ASYNC,
    RECEIVE_LATER,
    RECEIVE_NOW,
    LlCombineArgs,
    LlDispatchArgs,
    LlSizes,
)
from ep_kernels.bootstrap import Bootstrap, make_on_all
from ep_kernels.call_queue import CallQueue
from ep_kernels.config import Settings
from ep_kernels.errors import EPConfigError, EPDeviceError, EPTimeoutError
from ep_kernels.event import Event
from ep_kernels.ll_carriers import ArrivingRows
from ep_kernels.ll_exchange import (
    BARRIER,
    COMBINE,
    DISPATCH,
    REFUSED,
    Header,
    LlExchange,
    check_with,
)
from ep_kernels.ll_memory import LlMemory
from ep_kernels.node_calls import NodeCalls
from ep_kernels.nodes_ll_rows import LlDispatch, LlRows, Placed, Take
from ep_kernels.topology import Topology


class NodesLowLatency:
    """One rank's low-latency region; calls run one after the other, on the caller's thread or
    behind asynchronous ones on a queue's.

    Args:
        exchange: with all ranks; it is closed with the region.
        calls: the buffer's others.
        expert_to_rank: [E].
        memory: where rows are.
        num_bytes: of the region.

    Raises:
        EPConfigError: num_bytes is too small for any call.
    """

    def __init__(
        self,
        exchange: LlExchange,
        calls: NodeCalls,
        expert_to_rank: Sequence[int],
        memory: LlMemory,
        num_bytes: int,
    ) -> None:
        self._exchange, self._calls, self._memory = exchange, calls, memory
        self._num_ranks, self._rank = exchange.num_ranks, exchange.rank
        self._num_experts = len(expert_to_rank)
        placed = Placed.of(expert_to_rank)
        self._rows = LlRows(placed, self._rank, self._num_ranks, memory, num_bytes)
        if num_bytes < self._rows.needed_bytes(LlSizes(num_max_tokens_per_rank=1, hidden=8)):
            raise EPConfigError(f"low_latency_bytes={num_bytes} leaves no room for rows")
        self._queue = CallQueue()
        self._num_calls = 0
        self._alive: dict[int, LlDispatch] = {}
        self._receives: dict[int, Callable[[], None]] = {}  # halves that hooks run
        self._is_closed = False

    # Region

    def choose_num_sms(self, wanted: int | None, *, default: int) -> int:
        return wanted or default

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._rows.view(offset, shape, dtype)

    def dispatch(
        self, args: LlDispatchArgs, receive: int, *, keep: Any
    ) -> tuple[int, int, Event | None]:
        """Number of the call, half of its rows, and the event of an asynchronous call."""
        self._follow_earlier()
        with self._refusing():
            self._calls.check_callable()
            topk_idx = self._choices_on_host(args.topk_idx, args.sizes)
            on_host = LlDispatchArgs.from_buffer_copy(args)
            on_host.topk_idx = topk_idx.data_ptr()
            check_with("dispatch", on_host, self._num_experts)
            self._check_fits(args.sizes)
            made = self._rows.plan(args.sizes, topk_idx, self._free_half())
        seq = self._next()
        self._alive[seq] = made

        def send() -> None:
            try:
                self._send_rows(seq, args, made)
            except BaseException:
                self._alive.pop(seq, None)
                raise

        def take() -> None:
            self._rows.unpack(args, made, self._taker(made.own, made.arriving))
            self._rows.add_to(args.wait_recv_cost_stats, self._exchange.waited_us)
            made.own, made.arriving = None, ArrivingRows()

        return seq, made.at, self._run(seq, send, take, receive, keep)

    def combine(self, args: LlCombineArgs, receive: int, *, keep: Any) -> tuple[int, Event | None]:
        """Number of the call, and the event of an asynchronous call."""
        self._follow_earlier()
        with self._refusing():
            self._calls.check_callable()
            made = self._find(args.dispatch)
            self._check_combine(args, made)
        seq = self._next()
        own: list[torch.Tensor] = []
        arriving: list[ArrivingRows] = []

        def send() -> None:
            self._announce(seq, Header(op=COMBINE, dispatch=args.dispatch, wire=args.wire))
            made.is_combined = True
            payloads = self._rows.pack_results(args, made)
            own.append(payloads[self._rank])
            recv_bytes = self._rows.result_bytes(args, made)
            arriving.append(self._exchange_rows(seq, payloads, recv_bytes))

        def add() -> None:
            self._rows.add(args, made, self._taker(own[0], arriving[0]))
            self._rows.add_to(args.wait_recv_cost_stats, self._exchange.waited_us)
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
            self._exchange.abandon(made.arriving)

    def barrier(self) -> None:
        self._check_usable()
        seq = self._next()

        def announce() -> None:
            self._announce(seq, Header(op=BARRIER))

        self._queue.run(announce)
        self._calls.barrier()

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

        def take_once(*, is_caller_waiting: bool = True) -> None:
            self._receives.pop(seq, None)
            try:
                with self._failing(), self._memory.half(is_caller_waiting=is_caller_waiting):
                    take()
                    self._exchange.settle()
            finally:
                kept.clear()

        def send_after_older() -> None:
            for number in [each for each in self._receives if each <= seq - 2]:
                self._receives[number]()  # its hook comes too late, or never
            with self._failing(), self._memory.half():
                send()

        try:
            self._queue.run(send_after_older)
        except BaseException:
            kept.clear()
            raise
        if receive == RECEIVE_NOW:
            self._queue.run(take_once)
        elif receive == RECEIVE_ASYNC:
            take_later = functools.partial(take_once, is_caller_waiting=False)
            return Event(self._queue.submit(take_later))
        else:
            assert receive == RECEIVE_LATER
            self._receives[seq] = take_once
        return None

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """A rank that fails by itself in the middle of a call tells the others so."""
        try:
            yield
        except (EPConfigError, EPTimeoutError):  # of all ranks; known to all
            raise
        except BaseException as error:
            self._exchange.give_up(error)
            if isinstance(error, RuntimeError):  # of torch
                raise EPDeviceError(str(error)) from None
            raise

    # Parts of calls

    def _send_rows(self, seq: int, args: LlDispatchArgs, made: LlDispatch) -> None:
        sizes, rows = made.sizes, self._rows
        headers = self._announce(
            seq,
            Header(
                op=DISPATCH,
                num_max_tokens_per_rank=sizes.num_max_tokens_per_rank,
                hidden=sizes.hidden,
                format=sizes.format,
                counts=rows.num_chosen(made),
            ),
        )
        rows.place(args, made, torch.stack([_counts(header) for header in headers]))
        payloads = rows.pack(args, made)
        made.own = payloads[self._rank]
        made.arriving = self._exchange_rows(seq, payloads, made.recv_bytes())

    def _exchange_rows(
        self, seq: int, payloads: Sequence[torch.Tensor], recv_bytes: Sequence[int]
    ) -> ArrivingRows:
        peers = self._exchange.peers
        sends = {peer: payloads[peer] for peer in peers}
        return self._exchange.exchange_rows(seq, sends, {peer: recv_bytes[peer] for peer in peers})

    def _taker(self, own: torch.Tensor | None, arriving: ArrivingRows) -> Take:
        def take(source: int) -> torch.Tensor:
            came = own if source == self._rank else self._exchange.take(arriving, source)
            return self._memory.empty(0) if came is None else came

        return take

    def _find(self, dispatch: int) -> LlDispatch:
        """One that can be combined."""
        made = self._alive.get(dispatch)
        handle = f"handle (of low-latency dispatch {dispatch})"
        if made is None:
            raise EPConfigError(f"{handle} was combined already: its rows are gone")
        if made.is_combined:
            raise EPConfigError(f"{handle} is being combined already")
        if dispatch in self._receives:
            raise EPConfigError(f"{handle}: run the hook of its dispatch first")
        return made

    def _check_combine(self, args: LlCombineArgs, made: LlDispatch) -> None:
        topk_idx, dispatched = self._choices_on_host(args.topk_idx, made.sizes), made.topk_idx.int()
        on_host = LlCombineArgs.from_buffer_copy(args)
        on_host.topk_idx, on_host.experts = topk_idx.data_ptr(), dispatched.data_ptr()
        check_with("combine", on_host, made.sizes)

    def _choices_on_host(self, address: int, sizes: LlSizes) -> torch.Tensor:
        with self._memory.half():
            return self._rows.choices_on_host(address, sizes)

    def _check_fits(self, sizes: LlSizes) -> None:
        needed, has = self._rows.needed_bytes(sizes), len(self._rows.region)
        if needed > has:
            raise EPConfigError(
                f"low_latency_bytes={has} is too small: num_max_tokens_per_rank="
                f"{sizes.num_max_tokens_per_rank} and hidden={sizes.hidden} need {needed}"
            )

    def _free_half(self) -> int:
        taken = {made.at: number for number, made in self._alive.items()}
        for at in self._rows.halves:
            if at not in taken:
                return at
        first, second = (taken[at] for at in self._rows.halves)
        raise EPConfigError(
            "two low-latency results are alive, the limit: combine, or let go of, that of call "
            f"{first} or {second}"
        )


def make_region_over_nodes(
    backend: NodeCalls, bootstrap: Bootstrap, settings: Settings, topology: Topology
) -> NodesLowLatency:
    """Connects all ranks; the region goes with the backend. Collective.

    Raises:
        EPConfigError, EPDeviceError: on all ranks.
    """
    memory, make_carrier = backend.low_latency_memory()
    exchange = LlExchange(
        bootstrap, topology, settings.num_experts, settings.timeout_s, make_carrier, backend.lose
    )

    def make() -> NodesLowLatency:
        return NodesLowLatency(
            exchange, backend, settings.expert_to_rank, memory, settings.low_latency_bytes
        )

    try:
        region = make_on_all(bootstrap, make)
    except BaseException:
        exchange.close()
        raise
    backend.when_destroyed(region.close)
    return region


def _counts(header: Header) -> torch.Tensor:
    assert header.counts is not None
    return header.counts
