"""Low-latency calls of GPUs over several nodes that the GPUs make themselves, over NVSHMEM.

The kernels are those of one node (`csrc/cuda/ll_*`), over symmetric memory: a rank whose memory
NVSHMEM has mapped is stored to, others are reached by puts. docs/low-latency.md, "Over NVSHMEM".

Giving symmetric memory back needs all ranks, and a buffer may go alone: its memory is given back
when the ranks make the next such buffer, or NVSHMEM ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import uuid
from collections.abc import Callable, Iterator
from ctypes import c_int32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ep_kernels import _native, env
from ep_kernels._native_nvshmem import NvshmemLlConfig, nvshmem_ll_library
from ep_kernels.bootstrap import make_on_all
from ep_kernels.cuda_backend import RawMemory, device_id
from ep_kernels.cuda_ll import CudaLlCalls
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError, EPTimeoutError
from ep_kernels.nvshmem import HEAP_EXTRA_BYTES
from ep_kernels.nvshmem_world import agree, attempt, device_index, is_usable, join_world

if TYPE_CHECKING:
    from ep_kernels._native_ll import LlCombineArgs, LlDispatchArgs
    from ep_kernels.bootstrap import Bootstrap
    from ep_kernels.config import Settings
    from ep_kernels.event import Event
    from ep_kernels.node_calls import NodeCalls
    from ep_kernels.topology import Topology

DIRECT = ("none", "node", "all")
"""By the number that the core has for it."""


def heap_bytes_of(low_latency_bytes: int) -> int:
    """What the low-latency calls of a buffer take of the symmetric heap, at most."""
    return low_latency_bytes * 3 // 2


@dataclass(frozen=True)
class LlMemory:
    """Symmetric memory of this rank, with words that are zero.

    Attributes:
        name: the same on all ranks.
        handle: of the core.
        address: of the region.
        num_far: ranks that are reached by puts.
    """

    name: str
    handle: int
    address: int
    num_far: int


_unused: dict[str, LlMemory] = {}
"""Memory that no buffer uses any more, by name."""


class NvshmemLowLatency(CudaLlCalls):
    """One rank's calls.

    Args:
        memory: of this rank.
        calls: the buffer's others: a rank that is lost in a call of one kind is for the other, too.
        num_bytes: of the region.
        give_back: is told, once, whether the memory may be used again.

    Raises:
        EPConfigError: num_bytes is too small for the words that ranks share.
    """

    def __init__(
        self,
        memory: LlMemory,
        calls: NodeCalls,
        num_bytes: int,
        *,
        max_num_sms: int,
        give_back: Callable[[bool], None],
    ) -> None:
        library, out = nvshmem_ll_library(), c_void_p()
        _native.call(library.ep_nvshmem_ll_create, memory.handle, num_bytes, ctypes.byref(out))
        region = torch.as_tensor(RawMemory(memory.address, num_bytes), device=calls.device)
        super().__init__(
            library,
            out.value,
            region,
            max_num_sms=max_num_sms,
            finish_calls=calls.finish_calls,
        )
        self._memory, self._calls, self._give_back = memory, calls, give_back
        self._has_failed = False
        calls.when_destroyed(self.close)

    def dispatch(self, args: LlDispatchArgs, receive: int, *, keep: Any) -> tuple[int, int, Event]:
        with self._failing():
            return super().dispatch(args, receive, keep=keep)

    def combine(self, args: LlCombineArgs, receive: int, *, keep: Any) -> tuple[int, Event]:
        with self._failing():
            return super().combine(args, receive, keep=keep)

    def receive(self, number: int, *, keep: Any) -> None:
        with self._failing():
            super().receive(number, keep=keep)

    def barrier(self) -> None:
        with self._failing():
            super().barrier()

    def refuse(self, reason: str) -> None:
        with self._failing():
            super().refuse(reason)

    def wait(self, number: int) -> None:
        with self._failing():
            super().wait(number)

    def mask(self, rank: int) -> None:
        raise EPConfigError(f"rank={rank}: ranks can be masked within one node only")

    def unmask(self, rank: int) -> None:
        """Nobody is masked."""
        self._calls.check_usable()

    def query_mask(self, num_ranks: int) -> torch.Tensor:
        self._calls.check_usable()
        return torch.zeros(num_ranks, dtype=torch.bool)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        if self._low_latency is not None:
            self._calls.check_usable()
        try:
            yield
        except EPTimeoutError as error:
            if not self._has_failed:
                self._has_failed = True
                self._calls.lose(error)
            raise

    def close(self) -> None:
        """Tells the peers, who may be in a call that this rank will not make."""
        if self._low_latency is None:
            return
        try:
            if is_usable():
                _native.call(self._library.ep_nvshmem_ll_memory_leave, self._memory.handle)
        except EPError:
            self._has_failed = True
        self._delete()
        self._give_back(not self._has_failed)


def make_region_over_nvshmem(
    calls: NodeCalls,
    bootstrap: Bootstrap,
    settings: Settings,
    topology: Topology,
    *,
    max_num_sms: int,
) -> NvshmemLowLatency:
    """Collective.

    Raises:
        EPConfigError, EPDeviceError, EPTimeoutError: on all ranks.
    """
    problem, direct = None, ""
    try:
        direct = env.nvshmem_direct()
    except EPConfigError as error:
        problem = error
    pes = join_world(
        bootstrap,
        device=calls.device,
        timeout_s=settings.timeout_s,
        heap_bytes=heap_bytes_of(settings.low_latency_bytes) + HEAP_EXTRA_BYTES,
        problem=problem,
        fields={
            "low_latency_bytes": settings.low_latency_bytes,
            "EP_KERNELS_NVSHMEM_DIRECT": direct,
        },
    )
    _give_back_unused(bootstrap, settings.timeout_s)
    shares_gpu = _shares_gpu(bootstrap, calls.device)
    agree(bootstrap, _growth_problem(settings.low_latency_bytes, shares_gpu=shares_gpu), {})
    experts = settings.expert_to_rank
    config = NvshmemLlConfig(
        device=device_index(calls.device),
        rank=topology.rank,
        num_ranks=topology.num_ranks,
        num_local_ranks=topology.num_local_ranks,
        num_experts=len(experts),
        direct=DIRECT.index(direct),
        region_bytes=settings.low_latency_bytes,
        timeout_us=int(settings.timeout_s * 1e6),
        pes=(c_int32 * len(pes))(*pes),
        expert_rank=(c_int32 * len(experts))(*experts),
    )
    memory = _make_memory(bootstrap, config, settings.timeout_s, shares_gpu=shares_gpu)

    def make() -> NvshmemLowLatency:
        with _unused_on_error(memory):
            return NvshmemLowLatency(
                memory,
                calls,
                settings.low_latency_bytes,
                max_num_sms=max_num_sms,
                give_back=lambda is_usable: _note_unused(memory, is_usable=is_usable),
            )

    return make_on_all(bootstrap, make, NvshmemLowLatency.close)


def _shares_gpu(bootstrap: Bootstrap, device: torch.device) -> bool:
    """Whether a GPU has several of the ranks."""
    devices = bootstrap.all_gather(device_id(device))
    return len(set(devices)) < len(devices)


def _growth_problem(num_bytes: int, *, shares_gpu: bool) -> EPDeviceError | None:
    """Why NVSHMEM is not asked for memory.

    NOTE: seen with 3.4.5: where ranks share a GPU, memory of a heap that has grown cannot be
    addressed by all of them, an error that ends the process.
    """
    chunk_bytes = env.nvshmem_chunk_bytes()
    needed = num_bytes + HEAP_EXTRA_BYTES
    if not shares_gpu or chunk_bytes is None or needed <= chunk_bytes:
        return None
    return EPDeviceError(
        f"low-latency calls need {num_bytes} bytes of symmetric memory, more than the heap of "
        f"{chunk_bytes} bytes has, and where ranks share a GPU it cannot grow: before the first "
        "buffer set NVSHMEM_CUMEM_GRANULARITY to a power of two above that, at most 2147483648, or "
        "NVSHMEM_DISABLE_CUDA_VMM=1 and NVSHMEM_SYMMETRIC_SIZE to what all buffers need"
    )


def _make_memory(
    bootstrap: Bootstrap, config: NvshmemLlConfig, timeout_s: float, *, shares_gpu: bool
) -> LlMemory:
    """Collective."""
    out, address, num_far = c_void_p(), c_uint64(), c_int32()
    problem = attempt(
        timeout_s,
        "make memory for low-latency calls",
        "ep_nvshmem_ll_memory_create",
        *map(ctypes.byref, (config, out, address, num_far)),
        library=nvshmem_ll_library,
    )
    # NOTE: the exchange of outcomes is also what keeps a rank from writing into memory whose words
    # are not zero yet.
    agree(bootstrap, problem, {})
    assert out.value is not None
    name = bootstrap.all_gather(uuid.uuid4().hex)[0]
    memory = LlMemory(name, out.value, address.value, num_far.value)
    if any(bootstrap.all_gather(num_far.value)):
        with _unused_on_error(memory):
            both_bytes = heap_bytes_of(config.region_bytes)
            agree(bootstrap, _growth_problem(both_bytes, shares_gpu=shares_gpu), {})
            problem = attempt(
                timeout_s,
                "make memory for rows of far ranks",
                "ep_nvshmem_ll_memory_add_far_rows",
                out,
                library=nvshmem_ll_library,
            )
            agree(bootstrap, problem, {})
    return memory


@contextlib.contextmanager
def _unused_on_error(memory: LlMemory) -> Iterator[None]:
    """A buffer that cannot be made leaves the memory that was made for it to the next one."""
    try:
        yield
    except (EPError, RuntimeError):
        _note_unused(memory, is_usable=True)
        raise


def _note_unused(memory: LlMemory, *, is_usable: bool) -> None:
    """A buffer is gone. Peers may still write to the memory of one that has failed: it is kept."""
    if is_usable:
        _unused[memory.name] = memory


def _give_back_unused(bootstrap: Bootstrap, timeout_s: float) -> None:
    """Memory that no rank uses, in the same order on all. Collective."""
    names = bootstrap.all_gather(sorted(_unused))
    for name in sorted(set.intersection(*map(set, names))):
        handle = c_void_p(_unused.pop(name).handle)
        problem = attempt(
            timeout_s,
            "give memory for low-latency calls back",
            "ep_nvshmem_ll_memory_destroy",
            handle,
            library=nvshmem_ll_library,
        )
        if problem is not None:
            raise problem
        nvshmem_ll_library().ep_nvshmem_ll_memory_delete(handle)
