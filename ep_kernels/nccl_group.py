"""Groups of transfers by NCCL."""

from __future__ import annotations

import contextlib
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from ep_kernels.bootstrap import MpiBootstrap, make_on_all
from ep_kernels.errors import EPConfigError, EPDeviceError
from ep_kernels.group_transport import Tensors
from ep_kernels.lanes import Lane
from ep_kernels.streams import CudaStream, device_errors, wait_until

if TYPE_CHECKING:
    from ep_kernels.bootstrap import Bootstrap


class NcclGroup:
    """A communicator of NCCL over the ranks of a lane, made at once.

    NOTE: torch's watchdog ends the process when a group is late. We come first: its deadline is far
    beyond that of the lane. It may also do so when NCCL reports an error, see docs/multi-node.md.

    Raises:
        EPDeviceError: NCCL cannot connect the ranks.
    """

    def __init__(self, lane: Lane, name: str, rows: CudaStream) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        topology, self._rows = lane.topology, rows
        self._behind = CudaStream(rows.raw.device)  # has a moment when a group is over
        self._is_aborted = False
        store = dist.PrefixStore(f"{name}/nccl/{topology.local_rank}", _get_default_store())
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=10 * lane.deadline_s + 60)
        with device_errors(), torch.cuda.device(rows.raw.device):
            self._group: Any = dist.ProcessGroupNCCL(
                store, topology.node, topology.num_nodes, options
            )
        words = torch.zeros(2 * topology.num_nodes, dtype=torch.uint8, device=rows.raw.device)
        torch.cuda.synchronize(rows.raw.device)
        sends = {node: words[2 * node : 2 * node + 1] for node in topology.other_nodes}
        recvs = {node: words[2 * node + 1 : 2 * node + 2] for node in topology.other_nodes}
        try:
            work = self.exchange(sends, recvs)
            if not wait_until(lambda: self.is_over(work), lane.deadline_s):
                raise EPDeviceError(f"NCCL: no connection within {lane.deadline_s:g} s")
        except BaseException:
            self.abort()
            raise

    def exchange(self, sends: Tensors, recvs: Tensors) -> Any:
        with device_errors(), torch.cuda.stream(self._rows.raw):
            self._group._start_coalescing()
            try:
                for node, tensor in sends.items():
                    self._group.send([tensor], node, 0)
                for node, tensor in recvs.items():
                    self._group.recv([tensor], node, 0)
            except BaseException:  # else all that NCCL is asked for on this thread stays open
                with contextlib.suppress(RuntimeError):
                    self._group._end_coalescing()
                raise
            work = self._group._end_coalescing()
        # NOTE: work.is_completed() is true for a group that has failed, too, whose kernel goes on.
        with device_errors(), torch.cuda.stream(self._behind.raw):
            work.wait()
        return self._behind.record()

    def is_over(self, work: Any) -> bool:
        with device_errors():
            return bool(work.event.query())

    def make_rows_wait(self, work: Any) -> None:
        self._rows.wait(work)

    def abort(self) -> None:
        if not self._is_aborted:
            self._is_aborted = True
            with contextlib.suppress(RuntimeError):
                self._group.abort()


def make_nccl_group(lane: Lane, bootstrap: Bootstrap, rows: CudaStream) -> NcclGroup:
    """Collective.

    Raises:
        EPConfigError: on all ranks; the buffer was made from an MPI communicator, or torch has no
            NCCL.
        EPDeviceError: on all ranks; NCCL cannot connect those of a lane.
    """
    import torch.distributed as dist

    if isinstance(bootstrap, MpiBootstrap):
        raise EPConfigError("EP_KERNELS_SCALEOUT=nccl needs a group of torch.distributed, not MPI")
    name = f"ep_kernels/{bootstrap.all_gather(uuid.uuid4().hex)[0]}"

    def connect() -> NcclGroup:
        if not dist.is_nccl_available():
            raise EPConfigError("EP_KERNELS_SCALEOUT=nccl, but torch was built without NCCL")
        return NcclGroup(lane, name, rows)

    return make_on_all(bootstrap, connect, NcclGroup.abort)
