"""Named choices of the public interface, and the settings of a buffer."""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Union

from ep_kernels import env
from ep_kernels.errors import EPConfigError
from ep_kernels.topology import place_experts

if TYPE_CHECKING:
    import torch

    from ep_kernels.bootstrap import Bootstrap


DEFAULT_STAGING_BYTES = 32 << 20
MAX_BYTES = 1 << 60
MAX_NUM_SMS = 1024
MAX_TIMEOUT_S = 1e7
"""Far beyond any use; nanoseconds of some times this still fit in 64 bits."""


class Layout(enum.Enum):
    """Order of the rows that dispatch delivers."""

    RANK_MAJOR = "rank_major"
    """One row per (token, destination rank), by source rank, then token."""

    EXPERT_MAJOR = "expert_major"
    """One row per (token, local expert): grouped by local expert, inside a group by source rank,
    then token. Group starts are multiples of `expert_alignment`."""


ExpertToRank = Union[str, Sequence[int], "torch.Tensor", None]


def make_expert_to_rank(
    num_experts: int, expert_to_rank: ExpertToRank, num_ranks: int
) -> tuple[int, ...]:
    """[E] rank of each expert; None is "linear".

    Example: make_expert_to_rank(4, None, 2) == (0, 0, 1, 1).

    Raises:
        EPConfigError: E is not divisible by the ranks, or the table has a wrong length or rank.
    """
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise EPConfigError(f"num_experts={num_experts!r} is not a positive int")
    if expert_to_rank is None or isinstance(expert_to_rank, str):
        return place_experts(expert_to_rank or "linear", num_experts, num_ranks)
    try:
        table = tuple(operator.index(rank) for rank in expert_to_rank)
    except (TypeError, ValueError):
        raise EPConfigError(f"expert_to_rank={expert_to_rank!r} is not a list of ints") from None
    if len(table) != num_experts:
        raise EPConfigError(
            f"expert_to_rank has {len(table)} entries, expected num_experts={num_experts}"
        )
    for expert, rank in enumerate(table):
        if not 0 <= rank < num_ranks:
            raise EPConfigError(
                f"expert_to_rank[{expert}]={rank} is outside [0, num_ranks={num_ranks})"
            )
    return table


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Checked arguments of a Buffer; see there."""

    num_experts: int
    expert_to_rank: tuple[int, ...]
    device: str
    pool_bytes: int
    has_default_pool: bool
    timeout_s: float
    num_sms: int | None
    num_local_ranks: int | None
    staging_bytes: int
    low_latency_bytes: int
    mask_silent_ranks: bool
    send_once: str

    # May differ between ranks; the kind of device may not.
    LOCAL = ("timeout_s", "num_sms", "device", "staging_bytes", "has_default_pool")

    @classmethod
    def check(
        cls,
        *,
        num_ranks: int,
        num_experts: int,
        expert_to_rank: ExpertToRank,
        device: str | torch.device,
        pool_bytes: int | None,
        timeout_s: float | None,
        num_sms: int | None,
        num_local_ranks: int | None,
        staging_bytes: int | None,
        low_latency_bytes: int = 0,
        mask_silent_ranks: bool = False,
    ) -> Settings:
        """Fills defaults in. Raises EPConfigError naming the argument and its value."""
        name = _check_device(device)
        return cls(
            num_experts=num_experts,
            expert_to_rank=make_expert_to_rank(num_experts, expert_to_rank, num_ranks),
            device=name,
            pool_bytes=_whole(
                "pool_bytes",
                env.default_pool_bytes(name) if pool_bytes is None else pool_bytes,
                high=MAX_BYTES,
            ),
            has_default_pool=pool_bytes is None,
            timeout_s=_positive(
                "timeout_s",
                env.default_timeout_s() if timeout_s is None else timeout_s,
                high=MAX_TIMEOUT_S,
            ),
            num_sms=_num_sms(num_sms, name),
            num_local_ranks=_check_num_local_ranks(num_local_ranks, num_ranks),
            staging_bytes=_whole(
                "staging_bytes",
                DEFAULT_STAGING_BYTES if staging_bytes is None else staging_bytes,
                high=MAX_BYTES,
            ),
            low_latency_bytes=_check_low_latency_bytes(low_latency_bytes),
            mask_silent_ranks=bool(mask_silent_ranks),
            send_once=env.send_once(),
        )

    @property
    def total_pool_bytes(self) -> int:
        """The low-latency region, which is the first range of the pool, and the rest of it."""
        return self.pool_bytes + -(-self.low_latency_bytes // 4096) * 4096


def _num_sms(value: int | None, device: str) -> int | None:
    if value is None:
        return None if device == "cpu" else env.num_sms()
    return _whole("num_sms", value, high=MAX_NUM_SMS)


def _check_low_latency_bytes(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BYTES:
        raise EPConfigError(f"low_latency_bytes={value!r} is not a number of bytes")
    return value


def _check_num_local_ranks(value: int | None, num_ranks: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise EPConfigError(f"num_local_ranks={value!r} is not a positive int")
    if num_ranks % value:
        raise EPConfigError(f"num_local_ranks={value} does not divide num_ranks={num_ranks}")
    return value


def _check_device(device: str | torch.device) -> str:
    """ "cpu", or "cuda:N" with the index filled in."""
    import torch

    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise EPConfigError(f"device={device!r} is not a device") from None
    if parsed.type == "cpu":
        return "cpu"
    if parsed.type != "cuda":
        raise EPConfigError(f"device={device!r} is neither a CPU nor a CUDA device")
    if not torch.cuda.is_available():
        raise EPConfigError(f"device={device!r}: torch sees no CUDA device")
    index = torch.cuda.current_device() if parsed.index is None else parsed.index
    if index >= torch.cuda.device_count():
        raise EPConfigError(f"device={device!r}: there are {torch.cuda.device_count()} devices")
    return f"cuda:{index}"


def _positive(name: str, value: float, *, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise EPConfigError(f"{name}={value!r} is not a positive number")
    if value > high:
        raise EPConfigError(f"{name}={value!r} is more than {high:g}")
    return value


def _whole(name: str, value: float, *, high: int) -> int:
    """A positive number without a fraction; 1e9 is one."""
    number = _positive(name, value, high=high)
    if math.floor(number) != number:
        raise EPConfigError(f"{name}={value!r} is not a whole number")
    return int(number)


def agree_on_settings(bootstrap: Bootstrap, check: Callable[[], Settings]) -> Settings:
    """Runs `check` on every rank and compares the outcomes. Collective.

    Where no rank was given a size of its pool, all take the smallest of their defaults: machines
    differ a little.

    Raises:
        EPConfigError: on every rank, if `check` raised it on one (naming that rank) or ranks
            disagree (naming the field and both values).
        Exception: what else `check` raised, on that rank.
    """
    problem: Exception | None = None
    mine: dict[str, Any] = {}
    settings: Settings | None = None
    try:
        settings = check()
        mine = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    except Exception as error:  # whichever: the others wait for this rank
        problem = error
    text = "" if problem is None else str(problem) or type(problem).__name__
    outcomes = bootstrap.all_gather((mine, text))
    if problem is not None:
        raise problem
    assert settings is not None
    for rank, (_, message) in enumerate(outcomes):
        if message:
            raise EPConfigError(f"rank {rank} refused to make this buffer: {message}")
    if all(theirs["has_default_pool"] for theirs, _ in outcomes):
        smallest = min(theirs["pool_bytes"] for theirs, _ in outcomes)
        for theirs, _ in outcomes:
            theirs["pool_bytes"] = smallest
        settings = replace(settings, pool_bytes=smallest)
    for rank, (theirs, _) in enumerate(outcomes):
        kinds = outcomes[0][0]["device"].split(":")[0], theirs["device"].split(":")[0]
        if kinds[0] != kinds[1]:
            raise EPConfigError(
                f"ranks disagree on device: rank 0 has {kinds[0]}, rank {rank} has {kinds[1]}"
            )
        for name, value in outcomes[0][0].items():
            if name not in Settings.LOCAL and theirs[name] != value:
                raise EPConfigError(
                    f"ranks disagree on {name}: rank 0 has {value}, rank {rank} has {theirs[name]}"
                )
    return settings
