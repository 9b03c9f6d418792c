"""The backend of GPUs over several nodes without a GPU: the same Python, and the CPU's steps for
work on rows. "Device" memory is a pool of its own, apart from the one that carries announcements.

Work on rows is as lazy as it may be: it runs when the host waits for it. So what is not ordered
behind something else finds memory that is not filled yet, or is filled anew already.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import uuid
import weakref
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from ep_kernels import _native, buffer
from ep_kernels._native_lane import OFFER_WORDS, LaneMergeArgs, LaneSums, lane_library
from ep_kernels.cpu_backend import CpuBackend, tensor_at
from ep_kernels.cuda_nodes import agree_on_transport, make_core
from ep_kernels.device_rows import DeviceRows
from ep_kernels.errors import EPDeviceError
from ep_kernels.group_transport import GroupTransport, PeerGroups
from ep_kernels.hierarchical import HierarchicalBackend
from ep_kernels.ll_carriers import GroupCarrier, LaneCarrier
from ep_kernels.transport import HostTransport


class LazyStream:
    """Runs its work when somebody waits for it; or, if it is eager, as soon as it may."""

    def __init__(self, *, is_eager=False):
        self._is_eager = is_eager
        self._waiting, self._num_given, self._num_run = [], 0, 0
        self._lock = threading.RLock()

    def give(self, work):
        with self._lock:
            self._waiting.append(work)
            self._num_given += 1
        if self._is_eager:
            self.run(self._num_given)

    def run(self, number):
        with self._lock:
            while self._num_run < number:
                self._num_run += 1
                self._waiting.pop(0)()

    def record(self):
        return LazyMoment(self, self._num_given)

    def wait(self, moment):
        self.give(moment.synchronize)

    def copy(self, to, of):
        if not is_known(of):  # of pageable memory: it is read at once
            of = of.clone()
        self.give(lambda: to.copy_(of))

    def add(self, to, of):
        self.give(lambda: to.add_(of))

    def host_memory(self, num_bytes):
        return known_memory(num_bytes, 0x3C)

    def synchronize(self):
        self.record().synchronize()


_known = {}
"""Memory on the "device" and pinned host memory, by address."""


def known_memory(num_bytes, content):
    memory = torch.full((num_bytes,), content, dtype=torch.uint8)
    storage = memory.untyped_storage()
    _known[storage.data_ptr()] = StorageWeakRef(storage)
    return memory


def is_known(tensor):
    found = _known.get(tensor.untyped_storage().data_ptr())
    return found is not None and not found.expired()


class LazyMoment:
    def __init__(self, stream, number):
        self._stream, self._number = stream, number

    def synchronize(self):
        self._stream.run(self._number)


class HostDevice:
    """A device whose memory is the host's.

    Attributes:
        copies_early: other streams than that of the work on rows are not lazy.
    """

    copies_early = False

    def __init__(self, bootstrap, settings, topology):
        self.memory = CpuBackend(bootstrap, settings, topology)
        self.rows, self._offers_bytes = LazyStream(), 8 * OFFER_WORDS * topology.num_ranks
        self._made = []

    def is_capturing(self):
        return False

    def current_stream(self):
        return LazyStream()

    def as_current(self, stream):
        return contextlib.nullcontext()

    def new_stream(self):
        return LazyStream(is_eager=self.copies_early)

    def new_memory(self, num_bytes):
        """Memory that is freed may be in use by work that was given before."""
        memory = known_memory(num_bytes, 0x5A)
        self._made = [*self._made[-200:], memory]
        return memory

    def step(self, name, *arguments):
        function = getattr(lane_library(), f"ep_lane_{name}")
        given = [self._as_given(argument) for argument in arguments]
        self.rows.give(lambda: _native.call(function, self.memory.core, *given))

    def _as_given(self, argument):
        """A launch takes structures, and the offers, as they are."""
        if isinstance(argument, int):
            return ctypes.create_string_buffer(
                ctypes.string_at(argument, self._offers_bytes), self._offers_bytes
            )
        given = type(argument._obj).from_buffer_copy(argument._obj)
        if isinstance(given, LaneMergeArgs):
            given.kept = (LaneSums * given.num_nodes)(*given.nodes[: given.num_nodes])
            given.nodes = given.kept
        return given

    def copy_to_host(self, to, address, stream):
        stream.give(lambda: ctypes.memmove(to.data_ptr(), address, to.nbytes))

    def wait_for_freed(self):
        pass

    def make_transport(self, lane, bootstrap):
        if agree_on_transport(bootstrap) == "nccl":
            name = bootstrap.all_gather(uuid.uuid4().hex)[0]
            return GroupTransport(
                lane, GlooGroup(lane, name, self.rows), self.rows, self.new_memory
            )
        return HostTransport(lane, self.rows, self.new_stream, self.new_memory)

    def low_latency_memory(self):
        memory = TwinLlMemory()

        def make_carrier(lane, bootstrap):
            if agree_on_transport(bootstrap) != "nccl":
                return LaneCarrier(lane, memory)
            stream, name = LazyStream(), bootstrap.all_gather(uuid.uuid4().hex)[0]
            group = GlooGroup(lane, name, stream)
            return GroupCarrier(PeerGroups(lane, group, stream), memory)

        return memory, make_carrier

    def close(self):
        pass


class OnDevice(torch.Tensor):
    """A tensor that does not work together with tensors of the host."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice):
                assert value.dim() == 0, f"{func.__name__}: a tensor of the host"
        return super().__torch_function__(func, types, args, kwargs or {})


class TwinLlMemory:
    """Work on rows must lie within half(), and keep host and device apart."""

    def __init__(self):
        self._is_in_half = False

    @contextlib.contextmanager
    def half(self, *, is_caller_waiting=True):
        assert not self._is_in_half
        self._is_in_half = True
        try:
            yield
        finally:
            self._is_in_half = False

    def empty(self, num_bytes):
        return known_memory(num_bytes, 0x5A).as_subclass(OnDevice)

    def host_memory(self, num_bytes):
        return known_memory(num_bytes, 0x3C)

    def at(self, address, shape, dtype):
        assert self._is_in_half
        return tensor_at(address, shape, dtype).as_subclass(OnDevice)

    def to_host(self, tensors):
        assert self._is_in_half
        assert all(isinstance(tensor, OnDevice) for tensor in tensors)
        return [tensor.as_subclass(torch.Tensor).clone() for tensor in tensors]

    def from_host(self, tensor):
        assert self._is_in_half
        assert not isinstance(tensor, OnDevice)
        return tensor.clone().as_subclass(OnDevice)


class GlooGroup:
    """Groups of transfers as NCCL has them: one after the other, on a thread as if it were a
    stream."""

    def __init__(self, lane, name, rows):
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        topology, self._rows = lane.topology, rows
        store = dist.PrefixStore(f"twin/{name}/{topology.local_rank}", _get_default_store())
        self._any_node = topology.other_nodes[0]
        self.messages = dist.ProcessGroupGloo(
            store, topology.node, topology.num_nodes, timedelta(seconds=20 * lane.deadline_s)
        )
        self._before = None

    def exchange(self, sends, recvs):
        packed = self._rows.record()
        group = _GroupUnderWay(self, sends, recvs, (self._before, packed))
        self._before = group
        return group

    def is_over(self, work):
        if work.is_finished.is_set() and work.error is not None:
            raise EPDeviceError(str(work.error))
        return work.is_finished.is_set()

    def make_rows_wait(self, work):
        self._rows.give(work.is_finished.wait)

    def abort(self):
        """Breaks all connections, as gloo does when a wait runs out of time."""
        with contextlib.suppress(RuntimeError):
            work = self.messages.recv([torch.zeros(1)], self._any_node, 1)
            work.wait(timedelta(milliseconds=1))


class _GroupUnderWay:
    def __init__(self, group, sends, recvs, before):
        self.is_finished, self.error = threading.Event(), None
        # The order of the transfers is the stream's: nothing is posted before the group's turn.
        arguments = (group, dict(sends), dict(recvs), before)
        threading.Thread(target=self._run, args=arguments, daemon=True).start()

    def _run(self, group, sends, recvs, before):
        try:
            group_before, packed = before
            if group_before is not None:
                group_before.is_finished.wait()
            packed.synchronize()
            works = [group.messages.recv([tensor], node, 0) for node, tensor in recvs.items()]
            works += [group.messages.send([tensor], node, 0) for node, tensor in sends.items()]
            for work in works:
                work.wait()
        except RuntimeError as error:
            self.error = error
        self.is_finished.set()


class TwinBackend(HierarchicalBackend):
    def __init__(self, bootstrap, settings, topology):
        core = make_core(bootstrap, settings, topology)
        device = HostDevice(bootstrap, settings, topology)
        super().__init__(core, DeviceRows(device), bootstrap, settings, topology)


def make_buffer(group, **options):
    """A Buffer of this backend."""

    def make(bootstrap, settings, topology):
        if topology.num_nodes == 1:
            return CpuBackend(bootstrap, settings, topology)
        return TwinBackend(bootstrap, replace(settings, low_latency_bytes=0), topology)

    with mock.patch.object(buffer, "_make_backend", make):
        made = buffer.Buffer(group, **options)
    if made.topology.num_nodes > 1 and made._low_latency is not None:
        region = made._low_latency._region
        view, alive = type(region).view, weakref.ref(region)
        # Those who call see tensors as their host does.
        region.view = lambda *arguments: view(alive(), *arguments).as_subclass(torch.Tensor)
    return made
