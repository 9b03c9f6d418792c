"""After a rank was lost: which ranks go on.

Ranks that lose several at once may have been told of different ones. They agree through the store
of the process group: each says that it is there and whom it gave up on, and waits for those whom
nobody gave up on; then the list that is written first counts for all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from ep_kernels import env
from ep_kernels.bootstrap import check_ranks, reporting_lost_store
from ep_kernels.errors import EPConfigError, EPTimeoutError

_POLL_S = 0.005
_calls: dict[str, int] = {}
"""By ranks: how often this process has asked who remains of them."""


def remaining_ranks(
    error: EPTimeoutError,
    *,
    group: Any = None,
    ranks: Sequence[int] | None = None,
    timeout_s: float | None = None,
) -> list[int]:
    """Those of `ranks` that make this call, too; for Buffer(ranks=).

    Every rank that is left calls it, once for each buffer that failed. It returns when all have
    come but those that somebody gave up on, or else after timeout_s, without the absent.

    Args:
        error: what a call of the buffer, or its making, raised.
        group: as given to the buffer.
        ranks: the same.
        timeout_s: how long to wait for a rank. None: 60, or EP_KERNELS_TIMEOUT_S. Ranks learn of a
            loss in their next call, so it should be longer than what a rank does between calls.

    Returns:
        Ranks of the group, ascending; the same list on all ranks that are in it.

    Raises:
        EPConfigError: ranks are none of the group, or `error` names none of them.
        EPDeviceError: the process that kept the group's store is gone.
        EPTimeoutError: the others have gone on without this rank.

    Example:
        Ranks 0 to 3, of which 2 and 3 die. Rank 0 is told of 2, rank 1 of 3: both get [0, 1].
    """
    bootstrap, members = check_ranks(group, ranks)
    lost = _lost_rank(error, members)
    wait_s = env.default_timeout_s() if timeout_s is None else timeout_s
    if not isinstance(wait_s, (int, float)) or not wait_s > 0:
        raise EPConfigError(f"timeout_s={timeout_s!r} is not a positive number")
    name = f"ep_kernels/remaining/{bootstrap.name}/{'-'.join(map(str, members))}"
    number = _calls[name] = _calls.get(name, 0) + 1
    with reporting_lost_store():
        call = _RollCall(f"{name}/{number}", members, bootstrap.rank)
        found = call.decide(lost, wait_s)
    if bootstrap.rank not in found:
        raise EPTimeoutError(
            f"rank {bootstrap.rank} came too late: of ranks {members}, {found} go on without it",
            rank=bootstrap.rank,
            phase="bootstrap",
            peer=bootstrap.rank,
        )
    return found


def _lost_rank(error: Any, members: list[int]) -> int:
    """As a rank of the group. Calls name ranks as their buffer numbers them."""
    if not isinstance(error, EPTimeoutError):
        raise EPConfigError(f"error={error!r} is no EPTimeoutError")
    known = {rank: rank for rank in members}
    if error.phase != "bootstrap":
        known = dict(enumerate(members))
    if error.peer is None or error.peer not in known:
        raise EPConfigError(f"error.peer={error.peer} is no rank of a buffer of ranks {members}")
    return known[error.peer]


class _RollCall:
    def __init__(self, name: str, members: list[int], rank: int) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        self._store = dist.PrefixStore(name, _get_default_store())
        self._members, self._rank = members, rank
        self._given_up_on: dict[int, int] = {}
        """By rank that has come: whom it gave up on."""

    def decide(self, lost: int, wait_s: float) -> list[int]:
        """NOTE: who finds the list already there takes it, be it in it or not."""
        self._store.set(str(self._rank), str(lost))
        end = time.monotonic() + wait_s
        while not self._store.check(["list"]):
            self._look()
            awaited = set(self._members) - set(self._given_up_on.values())
            if awaited <= set(self._given_up_on) or time.monotonic() > end:
                break
            time.sleep(_POLL_S)
        proposal = json.dumps(sorted(self._given_up_on))
        return json.loads(self._store.compare_set("list", "", proposal))

    def _look(self) -> None:
        for rank in set(self._members) - set(self._given_up_on):
            if self._store.check([str(rank)]):
                self._given_up_on[rank] = int(self._store.get(str(rank)))
