"""The backend of GPUs over several nodes without a GPU: the same Python, and the CPU's steps for
work on rows. "Device" memory is a pool of its own, apart from the one that carries announcements;
streams do their work at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import uuid
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import torch

from ep_kernels import _native, buffer
from ep_kernels._native_lane import lane_library
from ep_kernels.cpu_backend import CpuBackend
from ep_kernels.cuda_nodes import agree_on_transport, make_core
from ep_kernels.device_rows import DeviceRows
from ep_kernels.errors import EPDeviceError
from ep_kernels.hierarchical import HierarchicalBackend
from ep_kernels.nccl_transport import NcclTransport
from ep_kernels.streams import HostStream
from ep_kernels.transport import HostTransport


class HostDevice:
    """A device whose memory is the host's."""

    def __init__(self, bootstrap, settings, topology):
        self.memory = CpuBackend(bootstrap, settings, topology)
        self.rows = HostStream()

    def is_capturing(self):
        return False

    def current_stream(self):
        return self.rows

    def as_current(self, stream):
        return contextlib.nullcontext()

    def new_stream(self):
        return HostStream()

    def new_memory(self, num_bytes):
        return torch.full((num_bytes,), 0x5A, dtype=torch.uint8)

    def step(self, name, *arguments):
        function = getattr(lane_library(), f"ep_lane_{name}")
        _native.call(function, self.memory.core, *arguments)

    def copy_to_host(self, to, address, stream):
        ctypes.memmove(to.data_ptr(), address, to.nbytes)

    def wait_for_freed(self):
        pass

    def make_transport(self, lane, bootstrap):
        if agree_on_transport(bootstrap) == "nccl":
            name = bootstrap.all_gather(uuid.uuid4().hex)[0]
            return NcclTransport(lane, GlooGroup(lane, name), self.new_memory)
        return HostTransport(lane, self.rows, self.new_stream, self.new_memory)

    def close(self):
        pass


class GlooGroup:
    """Groups of transfers as NCCL has them: one after the other, on a thread as if it were a
    stream."""

    def __init__(self, lane, name):
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        topology = lane.topology
        store = dist.PrefixStore(f"twin/{name}/{topology.local_rank}", _get_default_store())
        self._any_node = topology.other_nodes[0]
        self.messages = dist.ProcessGroupGloo(
            store, topology.node, topology.num_nodes, timedelta(seconds=20 * lane.deadline_s)
        )
        self._before = None

    def exchange(self, sends, recvs):
        group = _GroupUnderWay(self, sends, recvs, self._before)
        self._before = group
        return group

    def is_over(self, work):
        if work.is_finished.is_set() and work.error is not None:
            raise EPDeviceError(str(work.error))
        return work.is_finished.is_set()

    def make_rows_wait(self, work):
        work.is_finished.wait()

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
            if before is not None:
                before.is_finished.wait()
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
        return buffer.Buffer(group, **options)
