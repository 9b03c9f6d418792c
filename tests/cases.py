"""The cases of the conformance suite, and what a rank does in each: call a Buffer, compare with the
specification. The functions that take `rank` first run on ranks (`ranks.run(function, ...)`).

A rank knows the inputs of all ranks: they follow from the case and the rank's number.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from host_view import HostView

from ep_kernels import reference
from ep_kernels.bootstrap import make_bootstrap
from ep_kernels.config import Layout
from ep_kernels.testing import assert_bitwise_equal, make_routing

UNEQUAL = (37, 0, 64, 1, 5, 33, 2, 17)
"""Tokens of ranks 0 to 7: none, one, odd counts."""

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8": torch.float8_e4m3fn,
    "fp8_int32_scales": torch.float8_e4m3fn,
}

SEED = 1234

SMALL_STAGING_BYTES = 64 << 10
"""So little that tens of tokens make several chunks."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch of all ranks, and the options of its calls.

    Attributes:
        num_tokens: of each rank; entries past num_ranks are ignored.
        routing: a name in ROUTING_KINDS.
        dtype: a name in DTYPES; rows of fp8 batches are combined in bf16.
        placement: None for linear blocks, or the rank of each expert.
        capacity: of each rank; None for no limit.
        weights: dtype of topk_weights, None to send none.
        num_biases: 0, 1 or 2.
    """

    num_ranks: int = 2
    num_tokens: tuple[int, ...] = UNEQUAL
    num_topk: int = 2
    num_experts: int = 6
    hidden: int = 16
    dtype: str = "bf16"
    routing: str = "uniform"
    placement: tuple[int, ...] | None = None
    layout: Layout = Layout.RANK_MAJOR
    expert_alignment: int = 1
    capacity: tuple[int, ...] | None = None
    weights: torch.dtype | None = torch.float32
    num_biases: int = 1
    num_sms: int | None = None
    seed: int = SEED

    def __str__(self):
        """Only what differs from the defaults: the id of a parameter."""
        parts = []
        for name, default in vars(Case()).items():
            value = getattr(self, name)
            if value != default:
                text = value.name if isinstance(value, Layout) else str(value).replace(" ", "")
                parts.append(f"{name}={text}")
        return ",".join(parts) or "default"

    @property
    def combine_dtype(self):
        return torch.bfloat16 if self.dtype.startswith("fp8") else DTYPES[self.dtype]

    @property
    def dispatch_options(self):
        return dict(layout=self.layout, expert_alignment=self.expert_alignment)

    def capacity_of(self, rank):
        return None if self.capacity is None else self.capacity[rank]


def make_routings(case):
    """Placement of the experts, and topk_idx and topk_weights of all ranks."""
    placement = None if case.placement is None else torch.tensor(case.placement)
    placement = reference.make_placement(case.num_experts, case.num_ranks, placement)
    routings = [
        make_routing(case.routing, n, case.num_topk, case.num_experts, seed=case.seed + src)
        for src, n in enumerate(case.num_tokens[: case.num_ranks])
    ]
    topk_idxs, weights = zip(*routings)
    return placement, list(topk_idxs), list(weights)


class World:
    """The inputs of all ranks, and what the specification makes of them on one rank."""

    def __init__(self, case, rank):
        self.case, self.rank = case, rank
        self.placement, self.topk_idxs, weights = make_routings(case)
        self.topk_weights = None
        if case.weights is not None:
            self.topk_weights = [of_rank.to(case.weights) for of_rank in weights]
        self.rows = [
            reference.recv_rows(
                self.topk_idxs,
                self.placement,
                dst,
                capacity=case.capacity_of(dst),
                **case.dispatch_options,
            )
            for dst in range(case.num_ranks)
        ]

    def xs(self, seed=0):
        """Rows of all ranks with random bytes: every bit pattern has to arrive."""
        case = self.case
        return [
            random_rows(len(idx), case.hidden, case.dtype, seed=case.seed + 100 * seed + src)
            for src, idx in enumerate(self.topk_idxs)
        ]

    def ys(self, seed=0):
        """What the experts of all ranks make of their rows; NaN in rows that nobody sent."""
        case = self.case
        ys = []
        for dst, rows in enumerate(self.rows):
            num_rows = len(rows.src_rank)
            y_seed = case.seed + 100 * seed + 50 + dst
            y = spread_values(num_rows, case.hidden, dtype=case.combine_dtype, seed=y_seed)
            ys.append(y.masked_fill(rows.src_rank[:, None] < 0, float("nan")))
        return ys

    def rank_counts(self):
        layouts = [reference.get_dispatch_layout(idx, self.placement) for idx in self.topk_idxs]
        return torch.stack([layout.num_tokens_per_rank for layout in layouts]).long()

    def recv_weights(self, dst):
        """topk_weights for combine, of rank `dst`: distinct values, NaN where nothing is served."""
        case, rows = self.case, self.rows[dst]
        columns = (case.num_topk,) if case.layout is Layout.RANK_MAJOR else ()
        shape = (len(rows.src_rank), *columns)
        weights = 1.0 + dst * 2**16 + torch.arange(torch.Size(shape).numel()).reshape(shape)
        is_sent = (rows.src_rank >= 0).reshape(-1, *[1 for _ in columns])
        return weights.masked_fill(~is_sent, float("nan")).to(case.weights)

    def bias(self, seed=0):
        """None, a tensor or a pair, for this rank."""
        case = self.case
        biases = [
            spread_values(
                len(self.topk_idxs[self.rank]),
                case.hidden,
                dtype=case.combine_dtype,
                seed=case.seed + 100 * seed + 80 + 10 * i + self.rank,
            )
            for i in range(case.num_biases)
        ]
        return {0: None, 1: biases[0] if biases else None, 2: tuple(biases)}[case.num_biases]

    def dispatch_result(self, xs):
        return reference.dispatch(
            xs,
            self.topk_idxs,
            self.topk_weights,
            placement=self.placement,
            rank=self.rank,
            capacity=self.case.capacity_of(self.rank),
            **self.case.dispatch_options,
        )

    def combine_result(self, ys, *, buffer=None, bias=None, topk_weights=None):
        """With a buffer: in the order of its nodes."""
        return reference.combine(
            ys,
            self.rows,
            self.topk_idxs[self.rank],
            placement=self.placement,
            rank=self.rank,
            bias=bias,
            topk_weights=topk_weights,
            num_local_ranks=buffer and buffer.topology.num_local_ranks,
        )


def random_rows(num_tokens, hidden, dtype, *, seed):
    """[T, H] of random bytes; with [T, ceil(H / 128)] random scales for the fp8 dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def random_bytes(num_columns, of):
        # Random int64 are several times faster to make than random bytes.
        num_words = -(-num_tokens * num_columns * of.itemsize // 8)
        limits = torch.iinfo(torch.int64)
        words = torch.randint(limits.min, limits.max, (num_words,), generator=generator)
        num_elements = num_tokens * num_columns
        return words.view(of)[:num_elements].reshape(num_tokens, num_columns)

    x = random_bytes(hidden, DTYPES[dtype])
    if not dtype.startswith("fp8"):
        return x
    scale_dtype = torch.int32 if dtype == "fp8_int32_scales" else torch.float32
    return x, random_bytes(-(-hidden // 128), scale_dtype)


def spread_values(num_rows, hidden, *, dtype, seed):
    """Rows whose sums tell the order of addition, also after rounding to `dtype`.

    Of many magnitudes; a quarter of the elements is +big or -big, which swallows what was added
    before and often cancels; some elements are -0.0.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_rows, hidden, generator=generator, dtype=torch.float64)
    exponents = torch.randint(-6, 4, (num_rows, 1), generator=generator)
    big = 2.0**15 if dtype == torch.float16 else 2.0**25
    values = torch.where(values.abs() > 1.15, values.sign() * big, torch.ldexp(values, exponents))
    return values.masked_fill(values.abs() < 0.001, -0.0).to(dtype)


def make_buffer(backend, *, group=None, case=None, **options):
    """A Buffer of the backend called so, for the experts of a case.

    "nodes" is the CPU backend over logical nodes, of 2 ranks if that makes several, else of 1;
    "cuda_nodes" that of GPUs; "twin" the same without a GPU, see twin.py.
    """
    if case is not None:
        options.setdefault("num_experts", case.num_experts)
        if case.placement is not None:
            options.setdefault("expert_to_rank", torch.tensor(case.placement))
    if backend == "reference":
        return reference.Buffer(group, **options)
    import ep_kernels

    options.setdefault("pool_bytes", 256 << 20)
    if backend in ("nodes", "twin", "cuda_nodes"):
        size = make_bootstrap(group).num_ranks
        options.setdefault("num_local_ranks", 2 if size in (4, 6, 8) else 1)
        options.setdefault("staging_bytes", SMALL_STAGING_BYTES)
    if backend in ("cuda", "cuda_nodes"):
        options.setdefault("num_sms", 8)  # not measured for each of many buffers
        options.setdefault("device", f"cuda:{dist.get_rank() % torch.cuda.device_count()}")
        buffer = ep_kernels.Buffer(group, **options)
        dirty(buffer, options["pool_bytes"] // 2)
        return HostView(buffer)
    make = ep_kernels.Buffer
    if backend == "twin":
        from twin import make_buffer as make
    buffer = make(group, device="cpu", **options)
    dirty(buffer, 2 << 20)
    return buffer


def dirty(buffer, num_bytes):
    """New memory is zero, used memory is not: what has to be zero must not be so by luck."""
    buffer.empty(num_bytes, dtype=torch.uint8).fill_(0x7F)


def device_results(buffer):
    """The same buffer; its results stay on its device, and a GPU's calls are not waited for."""
    if isinstance(buffer, HostView):
        return HostView(buffer.unwrapped, keeps_results=True)
    return buffer


def dispatch(buffer, world, xs):
    case, rank = world.case, world.rank
    return buffer.dispatch(
        xs[rank],
        world.topk_idxs[rank],
        None if world.topk_weights is None else world.topk_weights[rank],
        capacity=case.capacity_of(rank),
        num_sms=case.num_sms,
        **case.dispatch_options,
    )


def check_dispatch_result(got, world, xs, *, name="dispatch", is_cached=False):
    """Every field to the byte, up to the rows that the contract leaves open."""
    want, rows = world.dispatch_result(xs), world.rows[world.rank]
    for field in ("num_recv_tokens_per_expert", "expert_offsets", "num_overflow"):
        assert_bitwise_equal(getattr(got, field), getattr(want, field), name=f"{name}.{field}")
    weights, want_weights = got.recv_topk_weights, want.recv_topk_weights
    if world.case.layout is Layout.EXPERT_MAJOR and want_weights is not None:
        assert weights.shape == want_weights.shape
        weights, want_weights = weights[: rows.num_rows], want_weights[: rows.num_rows]
    want_idx = None if is_cached else want.recv_topk_idx
    assert_bitwise_equal(weights, want_weights, name=f"{name}.recv_topk_weights")
    assert_bitwise_equal(got.recv_topk_idx, want_idx, name=f"{name}.recv_topk_idx")
    for field in ("recv_x", "recv_scales"):
        value, want_value = getattr(got, field), getattr(want, field)
        if want_value is not None:
            assert value.shape == want_value.shape, f"{name}.{field}: {value.shape}"
            value, want_value = value[: rows.num_rows], want_value[: rows.num_rows]
        assert_bitwise_equal(value, want_value, name=f"{name}.{field}")


def check_combine(buffer, world, handle, *, seed=0, in_pool=False):
    """combine() of fresh rows, with bias and weights if the case has them."""
    case, rank = world.case, world.rank
    ys, bias = world.ys(seed), world.bias(seed)
    y, weights = ys[rank], None
    if in_pool:
        y = buffer.empty(*ys[rank].shape, dtype=ys[rank].dtype)
        y.copy_(ys[rank])
    if case.weights is not None:
        weights = [world.recv_weights(dst) for dst in range(case.num_ranks)]
    got = buffer.combine(
        y,
        handle,
        bias=bias,
        topk_weights=None if weights is None else weights[rank],
        num_sms=case.num_sms,
    )
    want = world.combine_result(ys, buffer=buffer, bias=bias, topk_weights=weights)
    assert_bitwise_equal(got, want, name="combine")
    return got


def check_round_trip(buffer, world, *, seed=0):
    """dispatch, dispatch of other rows along the cached routing, combine."""
    xs = world.xs(seed)
    result = dispatch(buffer, world, xs)
    check_dispatch_result(result, world, xs)
    assert_bitwise_equal(result.handle.rank_counts.cpu(), world.rank_counts(), name="rank_counts")
    other = world.xs(seed + 1)
    weights = None if world.topk_weights is None else world.topk_weights[world.rank]
    cached = buffer.dispatch(other[world.rank], topk_weights=weights, handle=result.handle)
    check_dispatch_result(cached, world, other, name="cached dispatch", is_cached=True)
    check_dispatch_result(result, world, xs, name="first dispatch, later")
    check_combine(buffer, world, result.handle, seed=seed)
    return result


# Functions of ranks


def run_case(rank, backend, case):
    world = World(case, rank)
    with make_buffer(backend, case=case) as buffer:
        got = buffer.get_dispatch_layout(world.topk_idxs[rank])
        want = reference.get_dispatch_layout(world.topk_idxs[rank], world.placement)
        assert_bitwise_equal(got, want, name="layout")
        check_round_trip(buffer, world)


def run_cases(rank, backend, cases):
    for case in cases:
        try:
            run_case(rank, backend, case)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


@contextlib.contextmanager
def subgroup(ranks_of_groups):
    """The process group, among several disjoint ones, that this rank belongs to."""
    groups = [dist.new_group(list(ranks)) for ranks in ranks_of_groups]
    mine = next(g for g, ranks in zip(groups, ranks_of_groups) if dist.get_rank() in ranks)
    try:
        yield mine
    finally:
        dist.destroy_process_group(mine)
