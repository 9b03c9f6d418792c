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
from ep_kernels.checks import check_int
from ep_kernels.errors import EPTimeoutError

_POLL_S = 0.005
_calls: dict[str, int] = {}
"""By ranks: how often this process has asked who remains of them."""


def remaining_ranks(
    group: Any = None,
    *,
    ranks: Sequence[int] | None = None,
    lost: int,
    timeout_s: float | None = None,
) -> list[int]:
    """Those of `ranks` that make this call, too; for Buffer(ranks=).

    Every rank that is left calls it, once for each buffer that failed. It returns when all have
    come but those that somebody gave up on, or else after timeout_s, without the absent.

    Args:
        group: as of the buffer that failed.
        ranks: the same.
        lost: `EPTimeoutError.peer` of the call that failed, which counts ranks as that buffer does;
            this rank itself, if the others gave up on it.
        timeout_s: how long to wait for a rank. None: 60, or EP_KERNELS_TIMEOUT_S. Ranks learn of a
            loss in their next call, so it should be longer than what a rank does between calls.

    Returns:
        Ranks of the group, ascending; the same list on all ranks that are in it.

    Raises:
        EPConfigError: ranks are none of the group, or `lost` is none of them.
        EPDeviceError: the process that kept the group's store is gone.
        EPTimeoutError: the others have gone on without this rank.

    Example:
        Ranks 0 to 3, of which 2 and 3 die. Rank 0 has lost=2, rank 1 has lost=3: both get [0, 1].
    """
    bootstrap, members = check_ranks(group, ranks)
    check_int("lost", lost, low=0, high=len(members) - 1)
    wait_s = env.default_timeout_s() if timeout_s is None else timeout_s
    name = f"ep_kernels/remaining/{bootstrap.name}/{'-'.join(map(str, members))}"
    number = _calls[name] = _calls.get(name, 0) + 1
    with reporting_lost_store():
        call = _RollCall(f"{name}/{number}", members, bootstrap.rank)
        found = call.decide(members[lost], wait_s)
    if bootstrap.rank not in found:
        raise EPTimeoutError(
            f"rank {bootstrap.rank} came too late: of ranks {members}, {found} go on without it",
            rank=bootstrap.rank,
            phase="bootstrap",
            peer=bootstrap.rank,
        )
    return found


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
