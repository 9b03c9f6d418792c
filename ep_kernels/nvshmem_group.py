"""Chunks of rows by NVSHMEM, from device memory to device memory.

A group of group_transport.py is one exchange of an NvshmemLane. It ends at its deadline, naming the
rank to blame.

Rings are kept when a buffer goes: giving them back needs all ranks, and a buffer may go alone. The
next buffer takes them, if all ranks have them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ep_kernels.errors import EPConfigError, EPDeviceError, EPError
from ep_kernels.group_transport import PeerGroup, Tensors
from ep_kernels.nvshmem import HEAP_EXTRA_BYTES, NvshmemLane, NvshmemOptions
from ep_kernels.nvshmem_ll import heap_bytes_of
from ep_kernels.streams import device_errors

if TYPE_CHECKING:
    from ep_kernels.bootstrap import Bootstrap
    from ep_kernels.config import Settings
    from ep_kernels.lanes import Lane
    from ep_kernels.streams import CudaStream

MIN_STAGING_BYTES = 8 << 20
"""Of rings: pieces that are too small cost more than they carry."""


class Rings(Protocol):
    """What is used of an NvshmemLane."""

    def exchange_bytes(self, sends: Tensors, recvs: Tensors) -> None: ...

    def check(self) -> None: ...


@dataclass(frozen=True)
class KeptRings:
    """Rings, and the name that all ranks know them by."""

    name: str
    rings: NvshmemLane


_kept: dict[str, KeptRings] = {}
"""Rings that no buffer uses, by name."""


class NvshmemGroup(PeerGroup):
    """The ranks of a lane, by node, as NVSHMEM connects them.

    Args:
        rings: to them.
        rows: the stream of the work that packs and reads chunks.
        network: one of its own, for exchanges.
        give_back: is called once, with whether the rings may be used again.
    """

    def __init__(
        self,
        rings: Rings,
        rows: CudaStream,
        network: CudaStream,
        give_back: Callable[[bool], None],
    ) -> None:
        self._rings, self._rows, self._network = rings, rows, network
        self._give_back: Callable[[bool], None] | None = give_back
        self._last: Any = None

    def exchange(self, sends: Tensors, recvs: Tensors) -> Any:
        import torch

        self._network.wait(self._rows.record())
        with device_errors(), torch.cuda.stream(self._network.raw):
            self._rings.exchange_bytes(sends, recvs)
        self._last = self._network.record()
        return self._last

    def is_over(self, work: Any) -> bool:
        """Raises EPTimeoutError, naming the rank to blame, if the exchange was given up;
        EPDeviceError if a peer has sent something else, which no rank refuses."""
        with device_errors():
            is_over = bool(work.event.query())
        if is_over:
            try:
                self._rings.check()
            except EPConfigError as error:
                raise EPDeviceError(str(error)) from None
        return is_over

    def make_rows_wait(self, work: Any) -> None:
        self._rows.wait(work)

    def abort(self) -> None:
        """An exchange that is under way ends by itself: with its peers, or at its deadline."""
        give_back, self._give_back = self._give_back, None
        if give_back is None:
            return
        try:
            give_back(self._last is None or self.is_over(self._last))
        except EPError:
            give_back(False)


def make_nvshmem_group(
    lane: Lane, bootstrap: Bootstrap, settings: Settings, rows: CudaStream, *, network: CudaStream
) -> NvshmemGroup:
    """Collective.

    Raises:
        EPConfigError, EPDeviceError, EPTimeoutError: on all ranks, as NvshmemLane.
    """
    staging_bytes = min(bootstrap.all_gather(settings.staging_bytes))
    options = NvshmemOptions(staging_bytes=max(staging_bytes, MIN_STAGING_BYTES))
    device = rows.raw.device
    low_latency_bytes = heap_bytes_of(settings.low_latency_bytes)

    def make() -> NvshmemLane:
        timeout_s = settings.timeout_s
        return NvshmemLane(
            bootstrap,
            lane.topology,
            device=device,
            timeout_s=timeout_s,
            options=options,
            heap_bytes=options.staging_bytes + HEAP_EXTRA_BYTES + low_latency_bytes,
        )

    def fits(rings: NvshmemLane) -> bool:
        is_alike = (rings.topology, rings.options) == (lane.topology, options)
        return is_alike and (rings.device, rings.timeout_s) == (device, settings.timeout_s)

    kept = take_rings(bootstrap, fits, make)

    def give_back(is_usable: bool) -> None:
        if is_usable:
            _kept[kept.name] = kept

    return NvshmemGroup(kept.rings, rows, network, give_back)


def take_rings(
    bootstrap: Bootstrap, fits: Callable[[Any], bool], make: Callable[[], Any]
) -> KeptRings:
    """Rings that all ranks have kept and that fit, or new ones. Collective."""
    offered = {name for name, kept in _kept.items() if fits(kept.rings)}
    common = set.intersection(*bootstrap.all_gather(offered))
    if common:
        return _kept.pop(min(common))
    rings = make()
    return KeptRings(bootstrap.all_gather(uuid.uuid4().hex)[0], rings)
