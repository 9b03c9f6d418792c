"""Cases of low-latency mode, and what a rank does in each: call a Buffer, compare with the
specification. As in cases.py a rank knows the inputs of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from cases import UNEQUAL, make_buffer, make_routings, spread_values

from ep_kernels import Buffer, reference
from ep_kernels.testing import assert_bitwise_equal

FP8_OPTIONS = {
    "bf16": {},
    "fp8": {"use_fp8": True},
    "fp8 rounded": {"use_fp8": True, "round_scale": True},
    "fp8 ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


_backend = ["cpu"]  # of this rank, while a function runs


def backend():
    """What make_ll_buffer() makes on this rank."""
    return _backend[0]


def run_on(rank, backend, function, *args):
    """Runs a function of a rank with buffers of `backend`."""
    _backend[0] = backend
    if backend in ("cuda", "cuda_nodes"):  # as a program does: its streams are those of its GPU
        torch.cuda.set_device(rank % torch.cuda.device_count())
    try:
        return function(rank, *args)
    finally:
        _backend[0] = "cpu"


class PoolOn:
    """Ranks that run functions with buffers of a backend."""

    def __init__(self, backend, pool):
        self._backend, self._pool = backend, pool

    def get(self, num_ranks):
        return RanksOn(self._backend, self._pool.get(num_ranks))


class RanksOn:
    def __init__(self, backend, ranks):
        self._backend, self._ranks = backend, ranks

    def run(self, function, *args, **options):
        return self._ranks.run(run_on, self._backend, function, *args, **options)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch of all ranks.

    Attributes:
        num_tokens: of each rank; entries past num_ranks are ignored.
        most: num_max_tokens_per_rank.
        format: a name in FP8_OPTIONS.
        wire: wire_format of combine.
    """

    num_ranks: int = 2
    num_tokens: tuple[int, ...] = UNEQUAL
    most: int = 64
    num_topk: int = 2
    num_experts: int = 8
    hidden: int = 128
    routing: str = "uniform"
    placement: tuple[int, ...] | None = None
    format: str = "bf16"
    wire: str = "bf16"
    num_sms: int | None = None
    seed: int = 77
    away: tuple[int, ...] = field(default=())

    def __str__(self):
        parts = []
        for name, default in vars(Case()).items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}".replace(" ", ""))
        return ",".join(parts) or "default"

    @property
    def dispatch_options(self):
        return FP8_OPTIONS[self.format]

    @property
    def hint(self):
        return Buffer.low_latency_size_hint(
            num_max_tokens_per_rank=self.most,
            hidden=self.hidden,
            num_ranks=self.num_ranks,
            num_experts=self.num_experts,
            num_local_experts=None
            if self.placement is None
            else max(map(self.placement.count, range(self.num_ranks))),
        )


class World:
    """The inputs of all ranks, and what the specification makes of them.

    Ranks in `case.away` are masked: their tokens reach nobody, their experts add nothing.
    """

    def __init__(self, case, rank):
        self.case, self.rank = case, rank
        self.placement, self.topk_idxs, self.topk_weights = make_routings(case)
        self.xs = [
            spread_values(len(idx), case.hidden, dtype=torch.bfloat16, seed=case.seed + 10 + src)
            for src, idx in enumerate(self.topk_idxs)
        ]
        self.rows = [self.rows_of(dst) for dst in range(case.num_ranks)]
        self.ys = [self.experts_of(dst) for dst in range(case.num_ranks)]

    def experts_of(self, dst):
        """What the experts of a rank make of their rows; NaN in rows that nobody sent."""
        case, is_sent = self.case, self.rows[dst].src_rank >= 0
        y = torch.full((*is_sent.shape, case.hidden), float("nan"), dtype=torch.bfloat16)
        num_rows = int(is_sent.sum())
        seed = case.seed + 50 + dst
        y[is_sent] = spread_values(num_rows, case.hidden, dtype=torch.bfloat16, seed=seed)
        return y

    def rows_of(self, dst):
        idxs = [
            torch.full_like(idx, -1) if src in self.case.away else idx
            for src, idx in enumerate(self.topk_idxs)
        ]
        return reference.low_latency_dispatch(
            self.xs,
            idxs,
            placement=self.placement,
            rank=dst,
            num_max_tokens_per_rank=self.case.most,
            **self.case.dispatch_options,
        )

    def sums(self):
        case, rank = self.case, self.rank
        return reference.low_latency_combine(
            self.ys,
            self.rows,
            self.topk_idxs[rank],
            self.topk_weights[rank],
            placement=self.placement,
            rank=rank,
            wire_format=case.wire,
            missing_ranks=case.away,
        )


def make_ll_buffer(case, **options):
    options.setdefault("low_latency_bytes", case.hint)
    options.setdefault("num_sms", case.num_sms)
    if case.placement is not None:
        options.setdefault("expert_to_rank", torch.tensor(case.placement))
    return make_buffer(backend(), num_experts=case.num_experts, **options)


def dispatch(buffer, world, **options):
    case, rank = world.case, world.rank
    return buffer.low_latency_dispatch(
        world.xs[rank],
        world.topk_idxs[rank],
        num_max_tokens_per_rank=case.most,
        num_experts=case.num_experts,
        **case.dispatch_options,
        **options,
    )


def combine(buffer, world, handle, *, zero_copy=False, **options):
    case, rank = world.case, world.rank
    y = world.ys[rank]
    if zero_copy:
        y = buffer.next_low_latency_combine_buffer(handle).copy_(y)
    return buffer.low_latency_combine(
        y,
        world.topk_idxs[rank],
        world.topk_weights[rank],
        handle,
        zero_copy=zero_copy,
        wire_format=case.wire,
        **options,
    )


def away_mask(case):
    return torch.tensor([rank in case.away for rank in range(case.num_ranks)])


def check_dispatch(result, world):
    """Every row that somebody sent, to the byte."""
    want = world.rows[world.rank]
    for name in ("recv_count", "recv_rank_counts"):
        assert_bitwise_equal(getattr(result, name), getattr(want, name), name=name)
    assert_bitwise_equal(result.missing_ranks, away_mask(world.case), name="missing_ranks")
    is_sent = want.src_rank >= 0
    for name in ("recv_x", "recv_scales"):
        got, expected = getattr(result, name), getattr(want, name)
        assert (got is None) == (expected is None), name
        if got is not None:
            assert got.shape == expected.shape, name
            assert_bitwise_equal(got.contiguous()[is_sent], expected[is_sent], name=name)
    if result.recv_scales is not None:
        num_rows, num_scales = result.recv_scales.shape[1:]
        assert result.recv_scales.stride() == (num_rows * num_scales, 1, num_rows)


def check_combine(result, world):
    assert_bitwise_equal(result.x, world.sums(), name="combine")
    assert_bitwise_equal(result.missing_ranks, away_mask(world.case), name="missing_ranks")


def check_round(buffer, world, *, zero_copy=False):
    result = dispatch(buffer, world)
    check_dispatch(result, world)
    check_combine(combine(buffer, world, result.handle, zero_copy=zero_copy), world)
    return result


# Functions of ranks


def run_case(rank, case):
    world = World(case, rank)
    with make_ll_buffer(case) as buffer:
        for zero_copy in (False, *([] if case.wire == "fp8" else [True]), False):
            check_round(buffer, world, zero_copy=zero_copy)


def run_cases(rank, cases):
    for case in cases:
        try:
            run_case(rank, case)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
