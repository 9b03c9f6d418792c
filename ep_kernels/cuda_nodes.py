"""GPUs over several nodes: the memory and kernels of one node, and a transport to the others."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ep_kernels import _native, env
from ep_kernels._native_cuda_lane import CudaLaneConfig, cuda_lane_library
from ep_kernels.bootstrap import make_on_all
from ep_kernels.cpu_backend import CpuBackend
from ep_kernels.cuda_backend import CudaBackend
from ep_kernels.cuda_ll_memory import CudaLlMemory
from ep_kernels.device_rows import DeviceRows
from ep_kernels.errors import EPConfigError, EPDeviceError
from ep_kernels.group_transport import GroupTransport, PeerGroups
from ep_kernels.hierarchical import HierarchicalBackend
from ep_kernels.ll_carriers import GroupCarrier, LaneCarrier
from ep_kernels.nodes_ll import make_region_over_nodes
from ep_kernels.streams import CudaStream, Stream
from ep_kernels.transport import HostTransport

if TYPE_CHECKING:
    import torch

    from ep_kernels.bootstrap import Bootstrap
    from ep_kernels.config import Settings
    from ep_kernels.group_transport import PeerGroup
    from ep_kernels.lanes import Lane
    from ep_kernels.ll_carriers import MakeCarrier, RowCarrier
    from ep_kernels.ll_memory import LlMemory
    from ep_kernels.nodes_ll import NodesLowLatency
    from ep_kernels.nvshmem_ll import NvshmemLowLatency
    from ep_kernels.topology import Topology
    from ep_kernels.transport import Transport

CONTROL_POOL_BYTES = 4096
MAX_NODES = 64


class CudaNodesBackend(HierarchicalBackend):
    """Announcements in host memory that the ranks of a node share, rows in the memory of its GPUs.

    Raises:
        EPConfigError: ranks disagree on the transport, or it does not work here; on all ranks.
        EPDeviceError: no memory, or other nodes cannot be reached; on all ranks.
    """

    def __init__(self, bootstrap: Bootstrap, settings: Settings, topology: Topology) -> None:
        core = make_core(bootstrap, settings, topology)
        try:
            device = make_on_all(
                bootstrap,
                lambda: CudaDevice(bootstrap, settings, topology),
                CudaDevice.destroy,
                where=", by local ranks of its node",
            )
        except BaseException:
            core.destroy()
            raise
        super().__init__(core, DeviceRows(device), bootstrap, settings, topology)

    def make_region(
        self, bootstrap: Bootstrap, settings: Settings, topology: Topology
    ) -> NodesLowLatency | NvshmemLowLatency:
        """For low-latency calls. Collective."""
        if agree_on_transport(bootstrap) != "nvshmem":
            return make_region_over_nodes(self, bootstrap, settings, topology)
        from ep_kernels.nvshmem_ll import make_region_over_nvshmem

        assert isinstance(self._memory, CudaBackend)
        max_num_sms = self._memory.max_num_sms
        return make_region_over_nvshmem(
            self, bootstrap, settings, topology, max_num_sms=max_num_sms
        )


def make_core(bootstrap: Bootstrap, settings: Settings, topology: Topology) -> CpuBackend:
    """Host memory of a node's ranks for announcements only. Collective."""
    small = replace(settings, pool_bytes=CONTROL_POOL_BYTES, low_latency_bytes=0)
    return CpuBackend(bootstrap, small, topology)


class _NodeBootstrap:
    """The ranks of one node. All nodes do the same at the same time."""

    def __init__(self, bootstrap: Bootstrap, topology: Topology) -> None:
        self._bootstrap, self._local_ranks = bootstrap, topology.local_ranks
        self.rank, self.num_ranks = topology.local_rank, topology.num_local_ranks

    def all_gather(self, value: Any) -> list[Any]:
        values = self._bootstrap.all_gather(value)
        return [values[rank] for rank in self._local_ranks]


class CudaDevice:
    """A GPU, the pools of the node's ranks, and the kernels over them.

    Raises:
        EPDeviceError: as CudaBackend.
    """

    _lane: int | None = None

    def __init__(self, bootstrap: Bootstrap, settings: Settings, topology: Topology) -> None:
        # The compiled buffer serves memory only: of experts it knows nothing.
        of_node = replace(
            settings,
            num_experts=topology.num_local_ranks,
            expert_to_rank=tuple(range(topology.num_local_ranks)),
            low_latency_bytes=0,
            send_once="none",
        )
        self.memory = CudaBackend(_NodeBootstrap(bootstrap, topology), of_node)
        self._torch_device, self._settings = self.memory.device, settings
        try:
            self.rows = CudaStream(self._torch_device)
            self._library = cuda_lane_library()
            self._create(settings, topology)
        except BaseException:
            self.memory.destroy()
            raise

    def _create(self, settings: Settings, topology: Topology) -> None:
        if topology.num_nodes > MAX_NODES:
            raise EPConfigError(f"group: {topology.num_nodes} nodes, the limit is {MAX_NODES}")
        experts = (ctypes.c_int32 * settings.num_experts)(*settings.expert_to_rank)
        config = CudaLaneConfig(
            expert_rank=ctypes.addressof(experts),
            num_experts=settings.num_experts,
            rank=topology.rank,
            num_local_ranks=topology.num_local_ranks,
        )
        lane = ctypes.c_void_p()
        create = self._library.ep_cuda_lane_create
        _native.call(create, self.memory.core, ctypes.byref(config), ctypes.byref(lane))
        self._lane = lane.value

    def is_capturing(self) -> bool:
        import torch

        return torch.cuda.is_current_stream_capturing()

    def current_stream(self) -> CudaStream:
        import torch

        return CudaStream(self._torch_device, torch.cuda.current_stream(self._torch_device))

    def as_current(self, stream: Stream) -> contextlib.AbstractContextManager[Any]:
        import torch

        assert isinstance(stream, CudaStream)
        return torch.cuda.stream(stream.raw)

    def new_stream(self) -> CudaStream:
        return CudaStream(self._torch_device)

    def new_memory(self, num_bytes: int) -> torch.Tensor:
        import torch

        with torch.cuda.stream(self.rows.raw):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._torch_device)

    def step(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, f"ep_cuda_lane_{name}")
        _native.call(function, self._lane, *arguments, self.rows.raw.cuda_stream)

    def copy_to_host(self, to: torch.Tensor, address: int, stream: Stream) -> None:
        assert isinstance(stream, CudaStream)
        copy = self._library.ep_cuda_lane_copy
        _native.call(copy, self._lane, to.data_ptr(), address, to.nbytes, stream.raw.cuda_stream)

    def wait_for_freed(self) -> None:
        self.memory.wait_for_freed(self.rows.raw.cuda_stream)

    def make_transport(self, lane: Lane, bootstrap: Bootstrap) -> Transport:
        group = self._make_group(lane, bootstrap, self.rows)
        if group is None:
            return HostTransport(lane, self.rows, self.new_stream, self.new_memory)
        return GroupTransport(lane, group, self.rows, self.new_memory)

    def low_latency_memory(self) -> tuple[LlMemory, MakeCarrier]:
        memory = CudaLlMemory(self._torch_device)

        def make_carrier(lane: Lane, bootstrap: Bootstrap) -> RowCarrier:
            group = self._make_group(lane, bootstrap, memory.stream)
            if group is None:
                return LaneCarrier(lane, memory)
            return GroupCarrier(PeerGroups(lane, group, memory.stream), memory)

        return memory, make_carrier

    def _make_group(self, lane: Lane, bootstrap: Bootstrap, rows: CudaStream) -> PeerGroup | None:
        """What EP_KERNELS_SCALEOUT names; None: rows go through host memory. Collective."""
        name = agree_on_transport(bootstrap)
        if name == "nccl":
            from ep_kernels.nccl_group import make_nccl_group

            return make_nccl_group(lane, bootstrap, rows)
        if name == "nvshmem":
            from ep_kernels.nvshmem_group import make_nvshmem_group

            network = self.new_stream()
            return make_nvshmem_group(lane, bootstrap, self._settings, rows, network=network)
        return None

    def close(self) -> None:
        if self._lane is not None:
            lane, self._lane = self._lane, None
            with contextlib.suppress(EPDeviceError):
                self.rows.synchronize()
            self._library.ep_cuda_lane_delete(lane)

    def destroy(self) -> None:
        """Of a device that nothing was made of."""
        self.close()
        self.memory.destroy()


def agree_on_transport(bootstrap: Bootstrap) -> str:
    """ "host", "nccl" or "nvshmem", as all ranks say. Collective.

    Raises:
        EPConfigError: on all ranks; they disagree, or one knows no such transport.
    """
    outcomes = bootstrap.all_gather(_wished_transport())
    for rank, (name, problem) in enumerate(outcomes):
        if problem:
            raise EPConfigError(f"rank {rank}: {problem}")
        if name != outcomes[0][0]:
            raise EPConfigError(
                f"ranks disagree on EP_KERNELS_SCALEOUT: rank 0 has {outcomes[0][0]}, rank {rank} "
                f"has {name}"
            )
    return str(outcomes[0][0])


def _wished_transport() -> tuple[str, str]:
    """(name, problem)."""
    try:
        return env.scaleout_transport(), ""
    except EPConfigError as error:
        return "", str(error)
