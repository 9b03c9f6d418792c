"""Dispatch and combine over one group of ranks.

Symbols used in every docstring of this package:
    R  ranks of the group               E  experts in total       L  experts on this rank
    T  tokens on this rank, before      K  choices per token      H  hidden, elements per token
    N  rows on this rank, after dispatch                          S  scales per token (fp8 rows)
"""

from __future__ import annotations

import atexit
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from ep_kernels.backend import Backend, CallOptions
from ep_kernels.bootstrap import Bootstrap, make_bootstrap
from ep_kernels.checks import check_int
from ep_kernels.config import MAX_BYTES, ExpertToRank, Layout, Settings, agree_on_settings
from ep_kernels.errors import EPConfigError
from ep_kernels.event import Event
from ep_kernels.handle import CombineResult, DispatchHandle, DispatchLayout, DispatchResult
from ep_kernels.ht import HighThroughput, NewRouting
from ep_kernels.lanes import ScaleoutStats
from ep_kernels.ll import LowLatency, Region
from ep_kernels.ll_calls import LowLatencyCalls
from ep_kernels.ll_checks import GroupSizes
from ep_kernels.registry import register
from ep_kernels.topology import Topology, find_topology

_open_buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()


class Buffer(LowLatencyCalls):
    """Symmetric memory of one rank, and the all-to-all over it.

    Calls are collective: every rank of the group makes the same calls in the same order, also when
    a call fails. If a rank refuses its arguments, it raises EPConfigError that names the argument,
    and the matching call of every other rank raises EPConfigError that names the rank; nothing was
    sent and the buffer works on. After an EPTimeoutError the buffer is of no further use.

    One thread at a time calls a buffer. Calls have no gradients: tensors that require them are
    taken as they are; `ep_kernels.ops` and `megatron_ep.autograd` have those that do.

    Results lie in the rank's pool and stay valid until they are garbage-collected, also after
    destroy().

    Args:
        group: torch.distributed process group (None: the default one) or mpi4py communicator.
            Used here, to exchange a few objects, and never again.
        ranks: those of the group that take part, ascending; the others need not call, or be alive.
            They are numbered anew from 0. None: all. Needs a group of torch.distributed.
        num_experts: E.
        expert_to_rank: [E] rank of each expert, or "linear" (also None): blocks of E / R experts in
            order, or "round_robin": expert e on rank e mod R. The experts of a rank are numbered
            locally in ascending order.
        device: where rows live: "cpu", "cuda" (the current device) or "cuda:N".
        pool_bytes: limit of the memory for results on this rank, the same on all. None: on the CPU
            the machine's memory, taken when first used; on a GPU, where it is taken at once, an
            eighth of it; the smallest of all ranks.
        timeout_s: how long a rank waits for a silent peer. None: 60, or EP_KERNELS_TIMEOUT_S.
        num_sms: worker threads (CPU) or SMs (GPU) of this rank's transfers. None: the machine's
            cores over the ranks of a node; on a GPU EP_KERNELS_NUM_SMS, or as many as the measured
            rates of memory, link and SMs ask for (`ep_kernels/num_sms.py`).
        num_local_ranks: ranks per node; a token crosses the network once per node (see
            docs/multi-node.md). None: those that run in one place, as found.
        staging_bytes: limit of the memory for rows on their way between nodes. None: 32 MiB.
        low_latency_bytes: memory for low-latency calls besides, see low_latency_size_hint().
        mask_silent_ranks: a rank that is dead or silent is left out of low-latency calls from then
            on, and reported, instead of EPTimeoutError; on one node only. Masking a rank that may
            still write takes up to low_latency_bytes of the pool, until it has ended or is back.

    Raises:
        EPConfigError: an argument is wrong, ranks disagree, or nodes are uneven; on all ranks.
        EPDeviceError: no shared memory, or no connection between nodes; or ranks are given and the
            process that kept the group's store is gone.
        EPTimeoutError: one of the given ranks does not come.

    Example:
        >>> with Buffer(num_experts=8) as buffer:
        ...     result = buffer.dispatch(x, topk_idx, topk_weights, layout=Layout.EXPERT_MAJOR)
        ...     y = experts(result.recv_x, result.expert_offsets)
        ...     out = buffer.combine(y, result.handle).x

        To go on without a rank that was lost:
        >>> except EPTimeoutError as error:
        ...     buffer.destroy()
        ...     remaining = remaining_ranks(error, ranks=remaining)
        ...     buffer = Buffer(ranks=remaining, num_experts=8, expert_to_rank=new_placement)
    """

    def __init__(
        self,
        group: Any = None,
        *,
        ranks: Sequence[int] | None = None,
        num_experts: int,
        expert_to_rank: ExpertToRank = None,
        device: str | torch.device = "cpu",
        pool_bytes: int | None = None,
        timeout_s: float | None = None,
        num_sms: int | None = None,
        num_local_ranks: int | None = None,
        staging_bytes: int | None = None,
        low_latency_bytes: int = 0,
        mask_silent_ranks: bool = False,
    ) -> None:
        bootstrap = make_bootstrap(group, ranks=ranks, timeout_s=timeout_s)
        self._backend: Backend | None = None
        self.rank, self.num_ranks = bootstrap.rank, bootstrap.num_ranks
        settings = agree_on_settings(
            bootstrap,
            lambda: Settings.check(
                num_ranks=bootstrap.num_ranks,
                num_experts=num_experts,
                expert_to_rank=expert_to_rank,
                device=device,
                pool_bytes=pool_bytes,
                timeout_s=timeout_s,
                num_sms=num_sms,
                num_local_ranks=num_local_ranks,
                staging_bytes=staging_bytes,
                low_latency_bytes=low_latency_bytes,
                mask_silent_ranks=mask_silent_ranks,
            ),
        )
        self.topology = find_topology(bootstrap, settings.num_local_ranks)
        _check_masks(settings, self.topology)
        self.num_experts = settings.num_experts
        self.timeout_s = settings.timeout_s
        self.local_experts = [
            expert for expert, rank in enumerate(settings.expert_to_rank) if rank == self.rank
        ]
        self._backend = _make_backend(bootstrap, settings, self.topology)
        self.num_sms = self._backend.choose_num_sms(bootstrap, settings.num_sms)
        self._calls = HighThroughput(
            self._backend,
            num_ranks=self.num_ranks,
            num_experts=self.num_experts,
            num_local_experts=self.num_local_experts,
            num_sms=self.num_sms,
        )
        self._low_latency = self._make_low_latency(bootstrap, settings)
        self.name = register(self)  # in operators, see ops.py
        _open_buffers.add(self)

    # Properties

    @property
    def num_local_experts(self) -> int:
        """L."""
        return len(self.local_experts)

    @property
    def device(self) -> torch.device:
        """Where rows live."""
        return self._usable_backend().device

    def pool_stats(self) -> dict[str, int]:
        """Ranges in use, bytes in use and the most bytes that were in use, of this rank's pool."""
        return self._usable_backend().pool_stats()

    def scaleout_stats(self) -> ScaleoutStats:
        """Bytes that this rank exchanged with other nodes in finished calls; zeros on one node."""
        return self._usable_backend().scaleout_stats()

    # Calls

    def get_dispatch_layout(self, topk_idx: torch.Tensor) -> DispatchLayout:
        """Counts who would get how much, without communication.

        Args:
            topk_idx: [T, K] int64, global expert index; -1 chooses none.

        Raises:
            EPConfigError: shape or dtype, an expert out of range or chosen twice by a token. On a
                GPU, experts are not checked here, where it would cost a synchronisation, but by
                dispatch(); those out of range count as none.
        """
        return self._usable().get_dispatch_layout(topk_idx)

    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        layout: Layout = Layout.RANK_MAJOR,
        expert_alignment: int = 1,
        capacity: int | None = None,
        handle: DispatchHandle | None = None,
        async_op: bool = False,
        previous_event: Event | None = None,
        num_sms: int | None = None,
        cumulative_recv_stats: torch.Tensor | None = None,
        wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> DispatchResult:
        """Sends each token to the ranks of its experts.

        Args:
            x: [T, H] bfloat16, float16, float32 or float64, or a pair ([T, H] float8_e4m3fn,
                [T, S] float32 or int32 scales). A row is a multiple of 16 bytes.
            topk_idx: [T, K] int64, global expert index, each at most once per token; -1 chooses
                none. Must be None with a handle. K may differ between ranks in EXPERT_MAJOR only.
            topk_weights: [T, K] float32 or float64, travels with the rows.
            layout: RANK_MAJOR: one row per (token, destination rank), by source rank, then token.
                EXPERT_MAJOR: one row per (token, local expert), by expert, source rank, token.
            expert_alignment: EXPERT_MAJOR: groups start at multiples of it; rows between are zero.
            capacity: rows of the result. Those past it are dropped and counted in num_overflow;
                rows of recv_x that nothing fills are unspecified. None: as many as arrive.
            handle: of an earlier dispatch: the same routing again, with no exchange of counts.
                layout, expert_alignment and capacity are the handle's.
            async_op: return at once where sizes are known (with a handle or a capacity), otherwise
                after the counts are exchanged. Arguments must not be changed, and results not
                read, before `event`.
            previous_event: the transfer starts after it.
            num_sms: worker threads for this call.
            cumulative_recv_stats: [L] int32 or int64, tokens received are added: the choices of an
                expert, those past the capacity too, in both layouts.
            wait_recv_cost_stats: [R] int64, microseconds waited for each rank are added.

        Raises:
            EPConfigError: an argument is wrong here or on a peer, or ranks disagree.
            EPDeviceError: the pool of a rank is full; nothing was sent.
            EPTimeoutError: a peer is dead or silent.

        Example:
            Two ranks, two experts each, RANK_MAJOR. Rank 0 has topk_idx = [[0, 3], [2, 3]], rank 1
            has none. Rank 0 gets token 0 with recv_topk_idx [[0, -1]]; rank 1 gets tokens 0 and 1
            of rank 0 with recv_topk_idx [[-1, 1], [0, 1]].
        """
        routing = handle or NewRouting(
            topk_idx=topk_idx, layout=layout, expert_alignment=expert_alignment, capacity=capacity
        )
        calls = self._usable()
        if handle is not None and topk_idx is not None:
            calls.refuse("topk_idx is given together with handle, which has its own")
        options = CallOptions(
            async_op=async_op,
            previous_event=previous_event,
            num_sms=num_sms,
            cumulative_recv_stats=cumulative_recv_stats,
            wait_recv_cost_stats=wait_recv_cost_stats,
        )
        return calls.dispatch(x, topk_weights, routing=routing, options=options)

    def combine(
        self,
        x: torch.Tensor,
        handle: DispatchHandle,
        *,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        async_op: bool = False,
        previous_event: Event | None = None,
        num_sms: int | None = None,
        wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> CombineResult:
        """Brings the rows of a dispatch back and sums them per token, unweighted.

        The sum is made in fp32 (fp64 for float64), from zero, RANK_MAJOR by ascending rank,
        EXPERT_MAJOR by ascending position in topk_idx, then the biases; it is rounded once. With
        several nodes each node's rows are summed and rounded so, then these sums by ascending
        node, and the biases.

        Args:
            x: [N, H] bfloat16, float16, float32 or float64: a row for each row dispatched. A
                tensor from empty() or memory_pool() is read where it is, any other is copied first.
            handle: of the dispatch.
            topk_weights: RANK_MAJOR [N, K], EXPERT_MAJOR [N], float32 or float64: also brought
                back, to the choice that each entry served.
            bias: [T, H] of x's dtype, or a pair of them.
            async_op: as in dispatch().
            previous_event: as in dispatch().
            num_sms: as in dispatch().
            wait_recv_cost_stats: as in dispatch().

        Raises:
            EPConfigError, EPDeviceError, EPTimeoutError: as in dispatch().
        """
        options = CallOptions(
            async_op=async_op,
            previous_event=previous_event,
            num_sms=num_sms,
            wait_recv_cost_stats=wait_recv_cost_stats,
        )
        return self._usable().combine(
            x, handle, topk_weights=topk_weights, bias=bias, options=options
        )

    def empty(self, *shape: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor in this rank's pool; combine() reads it where it is.

        Args:
            shape: sizes, or one sequence of them, as in torch.empty().
            dtype: of the elements.

        Raises:
            EPConfigError: a size is no number of elements, or the buffer was destroyed.
            EPDeviceError: the pool is full.
        """
        given = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        sizes = tuple(check_int("shape", size, low=0) for size in given)
        if math.prod(sizes) > MAX_BYTES // dtype.itemsize:
            raise EPConfigError(f"shape={sizes} is more than any pool can hold")
        return self._usable_backend().empty(sizes, dtype)

    @contextmanager
    def memory_pool(self) -> Iterator[None]:
        """Inside of the block, what torch allocates on this thread lies in this rank's pool.

        For code that allocates its results itself, say the experts' last GEMM; combine() reads such
        a tensor where it is. On a GPU, that is memory of torch's caching allocator, which takes at
        least 2 MiB of the pool at a time (20 MiB for tensors between 1 and 10 MiB) and keeps it
        for later blocks of the thread, until destroy(), also what is too small for them. Tensors
        stay valid after that, and follow torch's rules for streams (Tensor.record_stream()). Blocks
        of several buffers may be nested.

        Ordinary memory, which combine() copies: all on the CPU, where the block does nothing (see
        empty()); what other threads allocate, such as those of a backward; what is captured in a
        CUDA graph, which has memory of its own.

        Raises:
            EPConfigError: the buffer was destroyed.
            EPDeviceError: this version of torch cannot do it on a GPU.
            torch.OutOfMemoryError: from what allocates, if the pool is full, or the buffer was
                destroyed inside of the block.

        Example:
            >>> with buffer.memory_pool():
            ...     y = torch.mm(rows, weight)
            >>> out = buffer.combine(y, handle).x
        """
        with self._usable_backend().memory_pool():
            yield

    def restore_handle(self, words: torch.Tensor, call: torch.Tensor) -> DispatchHandle:
        """The handle of a dispatch of this buffer from what DispatchHandle.to_tensors() gave.

        Raises:
            EPConfigError: the tensors do not fit together. Others than those cannot be told apart.
        """
        return self._usable().restore_handle(words, call)

    def refuse(self, reason: str) -> NoReturn:
        """Takes part in a high-throughput call that this rank cannot make, for code that checks
        arguments of its own: the matching calls of the other ranks raise EPConfigError.

        Raises:
            EPConfigError: with `reason`.
        """
        self._usable().refuse(reason)

    def barrier(self) -> None:
        """Returns once every rank has called it and all earlier calls have finished."""
        backend = self._usable_backend()
        if self._low_latency is not None:  # leaves masked ranks out
            self._low_latency.barrier()
        else:
            backend.barrier()

    def destroy(self) -> None:
        """Waits for calls under way and leaves the group; peers that still call get an error.

        Idempotent; needs no partner on the other ranks. Results stay valid.
        """
        if self._backend is not None:
            self._backend.destroy()
        self._backend = None

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.destroy()

    def __del__(self) -> None:
        if getattr(self, "_backend", None) is not None:
            self.destroy()

    def _make_low_latency(self, bootstrap: Bootstrap, settings: Settings) -> LowLatency | None:
        if settings.low_latency_bytes == 0:
            return None
        group = GroupSizes(
            num_ranks=self.num_ranks,
            num_experts=self.num_experts,
            num_local_experts=self.num_local_experts,
            device=self.device,
        )
        region = _make_region(self._usable_backend(), bootstrap, settings, self.topology)
        num_sms = region.choose_num_sms(settings.num_sms, default=self.num_sms)
        return LowLatency(region, group, rank=self.rank, num_sms=num_sms)

    def _usable(self) -> HighThroughput:
        self._usable_backend()
        return self._calls

    def _usable_backend(self) -> Backend:
        if self._backend is None:
            raise EPConfigError("this buffer was destroyed and cannot be used any more")
        return self._backend


def _check_masks(settings: Settings, topology: Topology) -> None:
    if settings.mask_silent_ranks and topology.num_nodes > 1:
        raise EPConfigError(
            f"mask_silent_ranks=True: the group spans {topology.num_nodes} nodes; ranks can be "
            "masked within one only"
        )


def _make_backend(bootstrap: Bootstrap, settings: Settings, topology: Topology) -> Backend:
    if topology.num_nodes > 1:
        return _make_backend_over_nodes(bootstrap, settings, topology)
    if settings.device == "cpu":
        from ep_kernels.cpu_backend import CpuBackend

        return CpuBackend(bootstrap, settings, topology)
    from ep_kernels.cuda_backend import CudaBackend

    return CudaBackend(bootstrap, settings)


def _make_backend_over_nodes(
    bootstrap: Bootstrap, settings: Settings, topology: Topology
) -> Backend:
    if settings.device == "cpu":
        from ep_kernels.hierarchical import make_cpu_backend

        return make_cpu_backend(bootstrap, settings, topology)
    from ep_kernels.cuda_nodes import CudaNodesBackend

    return CudaNodesBackend(bootstrap, settings, topology)


def _make_region(
    backend: Backend, bootstrap: Bootstrap, settings: Settings, topology: Topology
) -> Region:
    if topology.num_nodes > 1:
        from ep_kernels.cuda_nodes import CudaNodesBackend
        from ep_kernels.node_calls import NodeCalls
        from ep_kernels.nodes_ll import make_region_over_nodes

        if isinstance(backend, CudaNodesBackend):
            return backend.make_region(bootstrap, settings, topology)
        assert isinstance(backend, NodeCalls)
        return make_region_over_nodes(backend, bootstrap, settings, topology)
    num_bytes, mask_silent_ranks = settings.low_latency_bytes, settings.mask_silent_ranks
    if settings.device == "cpu":
        from ep_kernels.cpu_backend import CpuBackend
        from ep_kernels.cpu_ll import CpuLowLatency

        assert isinstance(backend, CpuBackend)
        return CpuLowLatency(backend, num_bytes, mask_silent_ranks=mask_silent_ranks)
    from ep_kernels.cuda_backend import CudaBackend
    from ep_kernels.cuda_ll import CudaLowLatency

    assert isinstance(backend, CudaBackend)
    return CudaLowLatency(backend, num_bytes, mask_silent_ranks=mask_silent_ranks)


@atexit.register
def destroy_open_buffers() -> None:
    """A rank that ends in good order tells its peers so."""
    for buffer in list(_open_buffers):
        buffer.destroy()
