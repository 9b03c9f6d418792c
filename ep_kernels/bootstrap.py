"""How the ranks of a buffer find each other: a few objects exchanged over an existing group."""

from __future__ import annotations

from typing import Any, Protocol

from ep_kernels.errors import EPConfigError


class Bootstrap(Protocol):
    """Rank, size, and an all-gather of picklable objects."""

    rank: int
    num_ranks: int

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank. Collective."""


class _TorchBootstrap:
    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise EPConfigError(
                f"group={group!r}: torch.distributed is not initialised; call "
                "torch.distributed.init_process_group() first, or pass an mpi4py communicator"
            )
        self._group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        if self.rank < 0:
            raise EPConfigError(f"group={group!r}: this process is not a member")

    def all_gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self._group)
        return values


class MpiBootstrap:
    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.rank = comm.Get_rank()
        self.num_ranks = comm.Get_size()

    def all_gather(self, value: Any) -> list[Any]:
        return list(self.comm.allgather(value))


def make_bootstrap(group: Any) -> Bootstrap:
    """Wraps a torch.distributed process group (None = the default one) or an mpi4py communicator.

    Raises:
        EPConfigError: `group` is neither, or this process is not in it.
    """
    if hasattr(group, "Get_rank") and hasattr(group, "allgather"):
        return MpiBootstrap(group)
    if group is not None and not hasattr(group, "size"):
        raise EPConfigError(
            f"group={group!r} is neither a torch.distributed process group nor an mpi4py "
            "communicator"
        )
    return _TorchBootstrap(group)
