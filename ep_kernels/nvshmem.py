"""Exchanges between GPUs of different nodes that the GPUs begin themselves, over NVSHMEM.

A lane connects the ranks with the same place on all nodes; see docs/multi-node.md, "NVSHMEM".
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterable, Mapping, Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch

from ep_kernels._native import call
from ep_kernels._native_nvshmem import (
    MAX_SECTIONS,
    LaneExchangeArgs,
    NvshmemConfig,
    nvshmem_library,
)
from ep_kernels.bootstrap import Bootstrap
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError
from ep_kernels.nvshmem_world import agree, attempt, device_index, join_world
from ep_kernels.topology import Topology

DEFAULT_NUM_BLOCKS = 4
DEFAULT_NUM_SLOTS = 4
DEFAULT_STAGING_BYTES = 64 << 20
HEAP_EXTRA_BYTES = 32 << 20
"""For the words of rings, and what NVSHMEM takes for itself."""


@dataclass(frozen=True, kw_only=True)
class NvshmemOptions:
    """Of a lane; the same on all ranks.

    Attributes:
        staging_bytes: memory for all rings of a rank, whatever the number of nodes.
        num_blocks: thread blocks of an exchange, each with a ring of its own to every peer.
        num_slots: pieces that are under way in a ring.
        is_direct: where the memory of a peer can be addressed, pack into it; else, and without
            this, pack into memory of this rank and put.
    """

    staging_bytes: int = DEFAULT_STAGING_BYTES
    num_blocks: int = DEFAULT_NUM_BLOCKS
    num_slots: int = DEFAULT_NUM_SLOTS
    is_direct: bool = False

    def __post_init__(self) -> None:
        for name in ("staging_bytes", "num_blocks", "num_slots"):
            if getattr(self, name) < 1:
                raise EPConfigError(f"{name}={getattr(self, name)!r} is not positive")


class NvshmemLane:
    """This rank's rings to and from the ranks with its place on the other nodes. Collective.

    Args:
        bootstrap: of all ranks.
        topology: at least two nodes.
        device: this rank's GPU.
        timeout_s: a rank waits this long for a peer.
        options: see there.
        heap_bytes: what NVSHMEM has room for, if this is what begins it; None: for the rings.

    Raises:
        EPConfigError: on all ranks, if they disagree on an option or it cannot be satisfied.
        EPDeviceError: on all ranks, if one lacks the library, NVSHMEM, a GPU or memory; the message
            names the rank and what it lacks.
        EPTimeoutError: NVSHMEM did not begin within the deadline.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        topology: Topology,
        *,
        device: torch.device,
        timeout_s: float,
        options: NvshmemOptions | None = None,
        heap_bytes: int | None = None,
    ) -> None:
        self.topology, self.device, self.timeout_s = topology, torch.device(device), timeout_s
        self.options = options or NvshmemOptions()
        self._handle: c_void_p | None = None
        self._ranks = [topology.lane_rank(node) for node in range(topology.num_nodes)]
        problem: EPError | None = None
        if topology.num_nodes < 2:
            problem = EPConfigError(f"num_nodes={topology.num_nodes}: a lane connects nodes")
        pes = join_world(
            bootstrap,
            device=self.device,
            timeout_s=timeout_s,
            heap_bytes=heap_bytes or self.options.staging_bytes + HEAP_EXTRA_BYTES,
            problem=problem,
            fields=vars(self.options) | {"num_nodes": topology.num_nodes},
        )
        self._pes = [pes[rank] for rank in self._ranks]
        handle, slot_bytes = c_void_p(), c_int64()
        arguments = (ctypes.byref(self._config()), ctypes.byref(handle), ctypes.byref(slot_bytes))
        problem = attempt(timeout_s, "make a lane", "ep_nvshmem_lane_create", *arguments)
        # NOTE: the exchange of outcomes is also what keeps a rank from writing into memory whose
        # words are not zero yet.
        agree(bootstrap, problem, {})
        self._handle, self.slot_bytes = handle, slot_bytes.value

    @property
    def num_nodes(self) -> int:
        return len(self._ranks)

    def exchange(
        self,
        sections: Sequence[tuple[torch.Tensor, torch.Tensor]],
        num_sent: Sequence[int],
        num_received: Sequence[int],
        *,
        tokens: torch.Tensor | None = None,
    ) -> None:
        """Enqueues an exchange with all nodes on the current stream. Collective over the lane.

        Every rank of the lane makes the same exchanges in the same order; what one sends to another
        is what that one receives from it. Rows arrive in the order in which they are sent.

        Args:
            sections: up to four pairs of source [rows, ...] and destination [received rows, ...],
                contiguous tensors of this GPU with the same bytes per row: rows, scales, ...
            num_sent: entries for each node, 0 for the own one.
            num_received: rows from each node, 0 from the own one.
            tokens: [sum(num_sent)] int32, rows of the sources, by node; None: 0, 1, 2, ...

        Raises:
            EPConfigError: an argument is wrong; nothing was sent.
            EPDeviceError: the lane was destroyed.
            EPTimeoutError: an earlier exchange of this lane has failed.
        """
        handle = self._open_handle()
        self._check_counts(num_sent, num_received)
        arguments = LaneExchangeArgs()
        for place, (src, dst) in enumerate(self._check_sections(sections, num_sent, num_received)):
            section = arguments.sections[place]
            section.src, section.dst = src.data_ptr(), dst.data_ptr()
            section.bytes = _row_bytes(src)
        if tokens is not None:
            self._check_tokens(tokens, sum(num_sent))
            arguments.tokens = tokens.data_ptr()
        rows = zip(_firsts(num_sent), num_sent, _firsts(num_received), num_received, strict=True)
        self._start("ep_nvshmem_lane_exchange", handle, arguments, rows)

    def exchange_bytes(
        self, sends: Mapping[int, torch.Tensor], recvs: Mapping[int, torch.Tensor]
    ) -> None:
        """As exchange(), with at most one tensor to and from each of the other nodes. Any two ranks
        that exchange something make the same exchanges in the same order.

        Args:
            sends: [bytes] uint8 of this GPU, by node.
            recvs: the same, for what comes.

        Raises:
            as exchange()
        """
        handle = self._open_handle()
        for name, tensors in (("sends", sends), ("recvs", recvs)):
            for node, tensor in tensors.items():
                self._check_bytes(f"{name}[{node}]", node, tensor)
        arguments = LaneExchangeArgs()
        section = arguments.sections[0]
        section.src, section.dst, section.bytes = _lowest(sends), _lowest(recvs), 1
        rows = [
            (*_range(sends, node, section.src), *_range(recvs, node, section.dst))
            for node in range(self.num_nodes)
        ]
        self._start("ep_nvshmem_lane_exchange_bytes", handle, arguments, rows)

    def check(self) -> None:
        """Raises what exchanges that have run found wrong.

        Raises:
            EPTimeoutError: a peer was silent; the lane has failed.
            EPConfigError: a peer sent something else than was expected; the lane has failed.
        """
        call(nvshmem_library().ep_nvshmem_lane_check, self._open_handle())

    def wait(self) -> None:
        """Waits on the host for the current stream, then check()."""
        torch.cuda.current_stream(self.device).synchronize()
        self.check()

    def destroy(self) -> None:
        """Gives the memory back. Collective over all ranks of the group, unless the lane has
        failed. Idempotent.

        Raises:
            EPTimeoutError: the other ranks did not do the same within the deadline.
        """
        handle, self._handle = self._handle, None
        if handle is None:
            return
        problem = attempt(self.timeout_s, "destroy the lane", "ep_nvshmem_lane_destroy", handle)
        if problem is not None:
            raise problem
        nvshmem_library().ep_nvshmem_lane_delete(handle)

    def _config(self) -> NvshmemConfig:
        options = self.options
        return NvshmemConfig(
            device=self._device_index(),
            node=self.topology.node,
            num_nodes=self.num_nodes,
            num_channels=options.num_blocks,
            num_slots=options.num_slots,
            is_direct=options.is_direct,
            staging_bytes=options.staging_bytes,
            timeout_us=int(self.timeout_s * 1e6),
            pes=(c_int32 * self.num_nodes)(*self._pes),
            ranks=(c_int32 * self.num_nodes)(*self._ranks),
        )

    def _device_index(self) -> int:
        return device_index(self.device)

    def _open_handle(self) -> c_void_p:
        if self._handle is None:
            raise EPDeviceError("the lane was destroyed")
        return self._handle

    def _start(
        self,
        name: str,
        handle: c_void_p,
        arguments: LaneExchangeArgs,
        counts: Iterable[tuple[int, ...]],
    ) -> None:
        """Enqueues an exchange; `counts` by node, as csrc/nvshmem/lane_args.h has them. Their
        memory stays with the stream as that of any tensor does."""
        with torch.cuda.device(self.device):  # threads begin with another one
            on_host = torch.tensor(list(counts), dtype=torch.int64).pin_memory()
            on_device = on_host.to(self.device, non_blocking=True)
            arguments.counts = on_device.data_ptr()
            stream = torch.cuda.current_stream(self.device).cuda_stream
            function = getattr(nvshmem_library(), name)
            call(function, handle, ctypes.byref(arguments), c_void_p(stream))

    def _check_counts(self, num_sent: Sequence[int], num_received: Sequence[int]) -> None:
        for name, values in (("num_sent", num_sent), ("num_received", num_received)):
            is_right = len(values) == self.num_nodes and min(values) >= 0
            if not is_right or values[self.topology.node] != 0:
                raise EPConfigError(
                    f"{name}={list(values)}: needs {self.num_nodes} counts, that of the own node "
                    f"{self.topology.node} being 0"
                )

    def _check_sections(
        self,
        sections: Sequence[tuple[torch.Tensor, torch.Tensor]],
        num_sent: Sequence[int],
        num_received: Sequence[int],
    ) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        if not 1 <= len(sections) <= MAX_SECTIONS:
            raise EPConfigError(f"{len(sections)} sections: needs 1 to {MAX_SECTIONS}")
        for place, (src, dst) in enumerate(sections):
            for name, tensor in (("source", src), ("destination", dst)):
                if tensor.device.type != "cuda" or tensor.device.index != self._device_index():
                    raise EPConfigError(f"{name} {place} is on {tensor.device}, not {self.device}")
                if tensor.dim() < 1 or not tensor.is_contiguous():
                    raise EPConfigError(f"{name} {place}, {list(tensor.shape)}, is not contiguous")
            if _row_bytes(src) != _row_bytes(dst) or _row_bytes(src) == 0:
                raise EPConfigError(
                    f"rows of source {place} have {_row_bytes(src)} bytes, of its destination "
                    f"{_row_bytes(dst)}"
                )
            if dst.shape[0] < sum(num_received):
                raise EPConfigError(
                    f"destination {place} has {dst.shape[0]} rows for {sum(num_received)}"
                )
        return sections

    def _check_bytes(self, name: str, node: int, tensor: torch.Tensor) -> None:
        if not 0 <= node < self.num_nodes or node == self.topology.node:
            raise EPConfigError(f"{name} is not of one of the other nodes of {self.num_nodes}")
        is_right = tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.is_contiguous()
        if not is_right or tensor.device.index != self._device_index():
            raise EPConfigError(
                f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}, needs contiguous "
                f"uint8 [bytes] on {self.device}"
            )

    def _check_tokens(self, tokens: torch.Tensor, num_entries: int) -> None:
        is_right = tokens.dtype == torch.int32 and tokens.is_contiguous() and tokens.is_cuda
        if not is_right or tokens.shape != (num_entries,):
            raise EPConfigError(
                f"tokens: {tokens.dtype} {list(tokens.shape)} on {tokens.device}, needs int32 "
                f"[{num_entries}] on {self.device}"
            )


def _row_bytes(tensor: torch.Tensor) -> int:
    return tensor.shape[1:].numel() * tensor.element_size()


def _lowest(tensors: Mapping[int, torch.Tensor]) -> int:
    """The address from which those of all tensors are counted."""
    return min((tensor.data_ptr() for tensor in tensors.values()), default=0)


def _range(tensors: Mapping[int, torch.Tensor], node: int, base: int | None) -> tuple[int, int]:
    """(first byte, bytes) of a node's tensor."""
    if node not in tensors:
        return 0, 0
    return tensors[node].data_ptr() - (base or 0), len(tensors[node])


def _firsts(counts: Sequence[int]) -> list[int]:
    """Exclusive prefix sums."""
    return [0, *itertools.accumulate(counts)][: len(counts)]
