"""What calls over several nodes have in common: the memory that they work with, how they run one
after the other, what becomes of those that fail. The calls themselves are in hierarchical.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ep_kernels import _native
from ep_kernels.backend import CallOptions, wait_for_previous
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.call_queue import CallQueue
from ep_kernels.config import Settings
from ep_kernels.cpu_backend import CpuBackend
from ep_kernels.errors import EPConfigError, EPError, EPTimeoutError
from ep_kernels.event import Event
from ep_kernels.lanes import ScaleoutStats
from ep_kernels.ll_carriers import MakeCarrier
from ep_kernels.ll_memory import LlMemory
from ep_kernels.node_control import NodeControl
from ep_kernels.node_rows import Caller, NodeRows
from ep_kernels.pool import Reservation
from ep_kernels.topology import Topology
from ep_kernels.transport import Transport

TRANSFER_PHASE = 4


class NodeCalls:
    """Calls run one after the other: on the caller's thread, or behind an asynchronous one on the
    queue's.

    Args:
        core: what the ranks of the node share in host memory.
        rows: where rows are. Both are this object's from now on.
        bootstrap, settings, topology: of the group.

    Raises:
        EPConfigError, EPDeviceError: other nodes cannot be reached; on all ranks.
    """

    chains_rows = False
    _control: NodeControl | None = None
    _transport: Transport | None = None

    def __init__(
        self,
        core: CpuBackend,
        rows: NodeRows,
        bootstrap: Bootstrap,
        settings: Settings,
        topology: Topology,
    ) -> None:
        self._core, self._rows, self._pid = core, rows, os.getpid()
        self._memory, self.device = rows.memory, rows.memory.device
        self._topology = topology
        self._queue = CallQueue()
        self._when_destroyed: list[Callable[[], None]] = []
        try:
            self._control = NodeControl(core, bootstrap, topology, settings.timeout_s)
            self._transport = rows.make_transport(self._control.lane, bootstrap)
        except BaseException:
            self.destroy()
            raise

    # Memory

    def choose_num_sms(self, bootstrap: Bootstrap, wanted: int | None) -> int:
        return self._memory.choose_num_sms(bootstrap, wanted)

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Reservation:
        return self._memory.reserve(shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._memory.empty(shape, dtype)

    def memory_pool(self) -> contextlib.AbstractContextManager[None]:
        return self._memory.memory_pool()

    def empty_words(self, num_words: int, *, options: CallOptions) -> torch.Tensor:
        return self._memory.empty_words(num_words, options=options)

    def pool_offset(self, tensor: torch.Tensor) -> int | None:
        return self._memory.pool_offset(tensor)

    def pool_stats(self) -> dict[str, int]:
        return self._memory.pool_stats()

    def scaleout_stats(self) -> ScaleoutStats:
        assert self._transport is not None
        return self._transport.stats()

    def low_latency_memory(self) -> tuple[LlMemory, MakeCarrier]:
        """Where rows of low-latency calls are, and what makes that which moves them."""
        return self._rows.low_latency_memory()

    # Calls

    def poll(self) -> None:
        """Calls keep nothing when they are over, and errors are their events' to raise."""
        try:
            self.check_callable()
        except EPConfigError as error:
            self.refuse(str(error))
            raise

    def check_callable(self) -> None:
        """Raises EPConfigError if no call can be made now."""
        self._rows.check_callable()

    def count_rows(self, topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Backend; on the host, which checks the indices, too."""
        counts, is_token_in_rank = self._core.count_rows(topk_idx.cpu())
        return counts.to(self.device), is_token_in_rank.to(self.device)

    def barrier(self) -> None:
        """Waits for all ranks, on the host."""
        control = self._usable
        post = control.make_post("barrier_post")
        seq = control.begin()

        def body() -> None:
            with self._call(seq):
                control.announce(seq, post)
                control.finish(seq)

        self._queue.run(body)

    def refuse(self, reason: str) -> None:
        """Takes part in a call that this rank rejects."""
        control = self._usable
        post = control.make_post("refusal", reason.encode())
        seq = control.begin()

        def body() -> None:
            with self._call(seq), contextlib.suppress(EPConfigError):
                control.announce(seq, post)  # raises what this rank refuses
            control.step("done", seq)

        self._queue.run(body)

    def destroy(self) -> None:
        """Waits for calls and leaves the group; results stay valid. Idempotent."""
        if self._core.core is None or self._pid != os.getpid():
            return
        self._queue.drain()
        while self._when_destroyed:
            self._when_destroyed.pop()()
        if self._control is not None:
            self._control.lane.close()
        if self._transport is not None:
            self._transport.close()
        self._rows.close()
        self._memory.destroy()
        self._core.destroy()

    def when_destroyed(self, function: Callable[[], None]) -> None:
        """Calls `function` before this rank leaves the group."""
        self._when_destroyed.append(function)

    def finish_calls(self) -> None:
        """Waits for the calls of this rank that are under way."""
        self._queue.drain()

    def check_usable(self) -> None:
        """Raises EPConfigError if the buffer was destroyed, or has failed."""
        self._usable.step("check_usable")

    def lose(self, error: EPTimeoutError) -> None:
        """A rank was lost in a call that others make over this group: no call can be made now."""
        phases = {name: number for number, name in _native.PHASES.items()}
        culprit = self._topology.rank if error.peer is None else error.peer
        self._fail(culprit, phases[error.phase or "transfer"], str(error))

    # How calls run

    @property
    def _usable(self) -> NodeControl:
        assert self._control is not None
        return self._control

    def _follow(self, options: CallOptions) -> Caller:
        wait_for_previous(options, self.refuse)
        return self._rows.caller(options)

    @contextlib.contextmanager
    def _call(self, seq: int, options: CallOptions | None = None) -> Iterator[None]:
        """Counts the waits of a call, or of a part of it. Tells the peers that this rank is through
        with a call that all of them refuse, or whom it lost, or that it failed itself: then they
        need not wait for what it still owed them."""
        self.check_usable()
        self._usable.waited_us.zero_()
        rank = self._topology.rank
        try:
            yield
            if options is not None:
                self._add(options.wait_recv_cost_stats, self._usable.waited_us)
        except EPTimeoutError as error:
            self.lose(error)
            raise
        except EPConfigError:
            self._rows.finish()
            self._usable.step("done", seq)
            raise
        except BaseException as error:
            self._fail(rank, TRANSFER_PHASE, f"rank {rank}: {type(error).__name__}: {error}")
            raise

    def _add(self, statistics: torch.Tensor | None, counts: torch.Tensor) -> None:
        """Adds to what the caller reads when the call is over."""
        if statistics is not None:
            self._rows.add(statistics, counts)
            self._rows.finish()

    def _fail(self, culprit: int, phase: int, reason: str) -> None:
        self._usable.step("fail", culprit, phase, reason.encode())
        self._usable.lane.close(culprit)
        if self._transport is not None:
            self._transport.close()
        with contextlib.suppress(EPError):
            self._rows.finish()  # what the call uses may go

    def _start(
        self, body: Callable[[], None], caller: Caller, keep: Any, options: CallOptions
    ) -> Event:
        if not options.async_op:
            self._queue.run(body)
            return Event()

        def body_with_memory() -> None:
            try:
                body()
            finally:
                with caller.as_current():
                    del keep_alive[:]

        keep_alive = [keep]
        return Event(self._queue.submit(body_with_memory))
