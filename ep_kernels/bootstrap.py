"""How the ranks of a buffer find each other: a few objects exchanged over an existing group."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from ep_kernels import env
from ep_kernels.config import MAX_TIMEOUT_S
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError, EPTimeoutError


class Bootstrap(Protocol):
    """Rank, size, and an all-gather of picklable objects."""

    rank: int
    num_ranks: int

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank. Collective."""


T = TypeVar("T")


def make_on_all(
    bootstrap: Bootstrap,
    make: Callable[[], T],
    undo: Callable[[T], object] = lambda made: None,
    *,
    where: str = "",
) -> T:
    """What `make` gives, if it does so on all ranks; else what it gave is undone. Collective.

    Args:
        bootstrap: of the ranks.
        make: on this rank.
        undo: of what this rank has made.
        where: for the message, behind the rank that could not make it.

    Raises:
        EPError: on all ranks, that of the first which could not; EPDeviceError for a RuntimeError,
            which is torch's.
    """
    made: T | None = None
    problem: EPError | None = None
    try:
        made = make()
    except EPError as error:
        problem = error.with_traceback(None)
    except RuntimeError as error:
        problem = EPDeviceError(str(error))
    for rank, found in enumerate(bootstrap.all_gather(problem)):
        if found is not None:
            if made is not None:
                undo(made)
            raise type(found)(f"rank {rank}{where}: {found}")
    assert made is not None
    return made


class TorchBootstrap:
    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise EPConfigError(
                f"group={group!r}: torch.distributed is not initialised; call "
                "torch.distributed.init_process_group() first, or pass an mpi4py communicator"
            )
        self._group = group
        self.name = (group or dist.distributed_c10d._get_default_group()).group_name
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


_attempts: dict[str, int] = {}
"""By ranks: the last attempt to make a buffer of them that this process took part in."""


class _SubsetBootstrap:
    """Some ranks of a process group, which exchange their objects through its store: the others,
    which may be dead, are not needed.

    Raises:
        EPConfigError: this rank is not among them.
        EPDeviceError: the process that kept the store is gone.
    """

    def __init__(self, group: TorchBootstrap, ranks: Sequence[int], timeout_s: float) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        if group.rank not in ranks:
            raise EPConfigError(f"ranks={list(ranks)} lacks this rank, {group.rank}")
        self._ranks, self._timeout_s, self._num_steps = ranks, timeout_s, 0
        self._base = self._store = _get_default_store()
        self.rank, self.num_ranks = ranks.index(group.rank), len(ranks)
        self._key = f"ep_kernels/{group.name}/{'-'.join(map(str, ranks))}"
        with reporting_lost_store():
            self._store = dist.PrefixStore(f"{self._key}/{self._enter()}", self._base)

    def _enter(self) -> int:
        """Number of the attempt to make a buffer of these ranks. The first of them counts attempts
        and withdraws one that failed; the others join the one that is new to them.
        """
        last = attempt = _attempts.get(self._key, 0)
        if self.rank == 0:
            attempt += 1
            self._base.set(self._key, str(attempt))
        end = time.monotonic() + self._timeout_s
        while attempt == last:
            self._wait(self._ranks[0], self._key)
            attempt = int(self._base.get(self._key))
            if time.monotonic() > end:
                raise self._nobody_came(self._ranks[0])
            time.sleep(0.005)
        _attempts[self._key] = attempt
        return attempt

    def all_gather(self, value: Any) -> list[Any]:
        """NOTE: raises EPTimeoutError naming a rank that does not come."""
        step, self._num_steps = self._num_steps, self._num_steps + 1
        keys = [f"{step}/{rank}" for rank in self._ranks]
        with reporting_lost_store():
            self._store.set(keys[self.rank], pickle.dumps(value).hex())
            for rank, key in zip(self._ranks, keys, strict=True):
                self._wait(rank, key)
            texts = [self._store.get(key).decode() for key in keys]
        return [pickle.loads(bytes.fromhex(text)) for text in texts]

    def _wait(self, rank: int, key: str) -> None:
        import torch.distributed as dist

        try:
            self._store.wait([key], timedelta(seconds=self._timeout_s))
        except dist.DistNetworkError:
            raise
        except RuntimeError:  # of a type that depends on the store
            if self.rank == 0:
                self._base.delete_key(self._key)
            raise self._nobody_came(rank) from None

    def _nobody_came(self, rank: int) -> EPTimeoutError:
        return EPTimeoutError(
            f"rank {self._ranks[self.rank]} waited {self._timeout_s:g} s for rank {rank} to "
            f"make a buffer of ranks {list(self._ranks)}",
            rank=self._ranks[self.rank],
            phase="bootstrap",
            peer=rank,
        )


@contextlib.contextmanager
def reporting_lost_store() -> Iterator[None]:
    import torch.distributed as dist

    try:
        yield
    except dist.DistNetworkError as error:
        raise EPDeviceError(
            "the store of the process group is gone with the process that kept it, so that no "
            f"buffer of the remaining ranks can be made: {error}"
        ) from None


def make_bootstrap(
    group: Any, *, ranks: Sequence[int] | None = None, timeout_s: float | None = None
) -> Bootstrap:
    """Wraps a torch.distributed process group (None = the default one) or an mpi4py communicator.

    Args:
        group: to wrap.
        ranks: those of the group that take part; None for all.
        timeout_s: how long they wait for each other; None for the default.

    Raises:
        EPConfigError: `group` is neither, this process is not in it, or ranks are not ranks of it.
        EPDeviceError: ranks cannot be reached.
    """
    if ranks is None:
        return _wrap_group(group)
    bootstrap, members = check_ranks(group, ranks)
    wait_s = env.default_timeout_s()
    if isinstance(timeout_s, (int, float)) and 0 < timeout_s <= MAX_TIMEOUT_S:
        wait_s = timeout_s  # others are refused with the rest
    return _SubsetBootstrap(bootstrap, members, wait_s)


def check_ranks(group: Any, ranks: Sequence[int] | None) -> tuple[TorchBootstrap, list[int]]:
    """A process group, and `ranks` of it, None for all.

    Raises:
        EPConfigError: as make_bootstrap().
    """
    bootstrap = _wrap_group(group)
    if not isinstance(bootstrap, TorchBootstrap):
        raise EPConfigError(f"ranks={ranks!r} needs a torch.distributed process group")
    if ranks is None:
        return bootstrap, list(range(bootstrap.num_ranks))
    if sorted(set(ranks)) != list(ranks) or not set(ranks) <= set(range(bootstrap.num_ranks)):
        raise EPConfigError(
            f"ranks={ranks!r} are not ascending ranks of the group, 0 to {bootstrap.num_ranks - 1}"
        )
    return bootstrap, list(ranks)


def _wrap_group(group: Any) -> Bootstrap:
    if hasattr(group, "Get_rank") and hasattr(group, "allgather"):
        return MpiBootstrap(group)
    if group is not None and not hasattr(group, "size"):
        raise EPConfigError(
            f"group={group!r} is neither a torch.distributed process group nor an mpi4py "
            "communicator"
        )
    return TorchBootstrap(group)
