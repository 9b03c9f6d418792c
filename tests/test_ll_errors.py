"""What low-latency calls refuse: on every rank, naming the argument and its value, and the buffer
works on.
"""

import ctypes
import functools
from dataclasses import replace

import cases
import ll_cases
import pytest
import torch
from ll_cases import Case, World

from ep_kernels import Buffer
from ep_kernels.errors import EPConfigError

pytestmark = pytest.mark.usefixtures("ll_backend")

CASE = Case(num_ranks=3, num_tokens=(20, 9, 33), num_topk=3, num_experts=6)
CULPRIT = 1


def change(world, **changes):
    """The arguments of a dispatch of this rank, with changes."""
    arguments = dict(
        x=world.xs[world.rank],
        topk_idx=world.topk_idxs[world.rank],
        num_max_tokens_per_rank=CASE.most,
        num_experts=CASE.num_experts,
    )
    return arguments | changes


def bad_dispatch(world, what):
    x, topk_idx = world.xs[world.rank], world.topk_idxs[world.rank].clone()
    if what == "range":
        topk_idx[0, 1] = 6
        return change(world, topk_idx=topk_idx)
    if what == "twice":
        topk_idx[0, 0] = topk_idx[0, 1] = 2
        return change(world, topk_idx=topk_idx)
    options = {
        "dtype": dict(x=x.float()),
        "tensor": dict(x=[1, 2]),
        "shape": dict(x=x[0]),
        "contiguous": dict(x=x.t().contiguous().t()),
        "hidden": dict(x=x[:, :12].contiguous()),
        "fp8 hidden": dict(x=x[:, :120].contiguous(), use_fp8=True),
        "ue8m0 hidden": dict(use_fp8=True, round_scale=True, use_ue8m0=True),
        "idx dtype": dict(topk_idx=topk_idx.int()),
        "idx tokens": dict(topk_idx=topk_idx[1:]),
        "num_topk": dict(topk_idx=torch.arange(7).repeat(len(x), 1)),
        "too many tokens": dict(num_max_tokens_per_rank=8),
        "no tokens": dict(num_max_tokens_per_rank=0),
        "num_experts": dict(num_experts=12),
        "scale": dict(round_scale=True),
        "ue8m0": dict(use_fp8=True, use_ue8m0=True),
        "async and hook": dict(async_op=True, return_recv_hook=True),
        "stats": dict(cumulative_recv_stats=torch.zeros(3, dtype=torch.int32)),
        "wait stats": dict(wait_recv_cost_stats=torch.zeros(3, dtype=torch.int32)),
        "region": dict(num_max_tokens_per_rank=1024),
    }
    return change(world, **options[what])


DISPATCH_ERRORS = {
    "dtype": "x has dtype torch.float32",
    "tensor": r"x=\[1, 2\]",
    "shape": r"x has shape \(128,\)",
    "contiguous": "x is not contiguous",
    "hidden": "hidden=12",
    "fp8 hidden": "hidden=120.*128",
    "ue8m0 hidden": "hidden=128.*512",
    "idx dtype": "topk_idx has dtype torch.int32",
    "idx tokens": r"topk_idx has shape \(8, 3\)",
    "num_topk": "num_topk=7",
    "too many tokens": "9 tokens.*num_max_tokens_per_rank=8",
    "no tokens": "num_max_tokens_per_rank=0",
    "num_experts": "num_experts=12",
    "scale": "round_scale=True",
    "ue8m0": "use_ue8m0=True",
    "async and hook": "async_op=True and return_recv_hook=True",
    "stats": r"cumulative_recv_stats has shape \(3,\)",
    "wait stats": "wait_recv_cost_stats has dtype torch.int32",
    "range": r"topk_idx\[0, 1\]=6",
    "twice": "expert 2 twice",
    "region": r"low_latency_bytes=\d+ is too small.*need \d+",
}


def on_rank_bad_dispatch(rank):
    world = World(CASE, rank)
    with ll_cases.make_ll_buffer(CASE, timeout_s=20.0) as buffer:
        for what, message in DISPATCH_ERRORS.items():
            arguments = bad_dispatch(world, what) if rank == CULPRIT else change(world)
            who = "" if rank == CULPRIT else f"rank {CULPRIT} refused.*"
            with pytest.raises(EPConfigError, match=f"(?s){who}{message}"):
                buffer.low_latency_dispatch(**arguments)
            if what in ("dtype", "twice", "region"):
                ll_cases.check_round(buffer, world)
        ll_cases.check_round(buffer, world)


def test_a_bad_dispatch_is_refused_everywhere_and_the_buffer_works_on(rank_pool):
    rank_pool.get(3).run(on_rank_bad_dispatch)


def bad_combine(world, handle, what):
    x, idx = world.ys[world.rank], world.topk_idxs[world.rank]
    weights = world.topk_weights[world.rank]
    other = idx.clone()
    other[0, 0] = -1
    if what == "overlap" and handle.combine_buffer.is_cuda:
        buffer = handle.combine_buffer
        before = buffer.storage_offset() - x.shape[2]
        x = buffer.as_strided(buffer.shape, buffer.stride(), before)
    elif what == "overlap":
        at = handle.combine_buffer.data_ptr() - x[0, 0].nbytes
        rows = (ctypes.c_byte * x.nbytes).from_address(at)
        x = torch.frombuffer(rows, dtype=x.dtype).view(x.shape)
    options = {
        "x": (x[:, 1:].contiguous(), idx, weights, handle, {}),
        "overlap": (x, idx, weights, handle, {}),
        "dtype": (x.half(), idx, weights, handle, {}),
        "weights": (x, idx, weights.double(), handle, {}),
        "idx": (x, idx[1:], weights, handle, {}),
        "routing": (x, other, weights, handle, {}),
        "handle": (x, idx, weights, None, {}),
        "wire": (x, idx, weights, handle, dict(wire_format="fp4")),
        "zero_copy": (x, idx, weights, handle, dict(zero_copy=True)),
        "out": (x, idx, weights, handle, dict(out=torch.empty(3, 3))),
    }
    *arguments, options = options[what]
    return arguments, options


COMBINE_ERRORS = {
    "x": "x has shape",
    "overlap": "x at 0x.* overlaps",
    "dtype": "x has dtype torch.float16",
    "weights": "topk_weights has dtype torch.float64",
    "idx": "topk_idx has shape",
    "routing": r"topk_idx\[0, 0\]=-1",
    "handle": "handle=None",
    "wire": "wire_format='fp4'",
    "zero_copy": "zero_copy=True",
    "out": "out has dtype",
}


def on_rank_bad_combine(rank):
    world = World(CASE, rank)
    with ll_cases.make_ll_buffer(CASE, timeout_s=20.0) as buffer:
        result = ll_cases.dispatch(buffer, world)
        for what, message in COMBINE_ERRORS.items():
            arguments, options = bad_combine(world, result.handle, "x"), {}
            if rank == CULPRIT:
                arguments, options = bad_combine(world, result.handle, what)
            else:
                arguments = [
                    world.ys[rank],
                    world.topk_idxs[rank],
                    world.topk_weights[rank],
                    result.handle,
                ]
            who = "" if rank == CULPRIT else f"rank {CULPRIT} refused.*"
            with pytest.raises(EPConfigError, match=f"(?s){who}{message}"):
                buffer.low_latency_combine(*arguments, **options)
        ll_cases.check_combine(ll_cases.combine(buffer, world, result.handle), world)
        with pytest.raises(EPConfigError, match="combined already"):
            ll_cases.combine(buffer, world, result.handle)
        later = ll_cases.dispatch(buffer, world, return_recv_hook=True)
        with pytest.raises(EPConfigError, match="run the hook"):
            ll_cases.combine(buffer, world, later.handle)
        later.hook()
        ll_cases.check_combine(ll_cases.combine(buffer, world, later.handle), world)


def test_a_bad_combine_is_refused_everywhere_and_can_be_made_again(rank_pool):
    rank_pool.get(3).run(on_rank_bad_combine)


DISAGREEMENTS = {
    "num_max_tokens_per_rank": (dict(num_max_tokens_per_rank=63), "63"),
    "hidden": ("hidden", "120"),
    "row format": (dict(use_fp8=True), "fp8"),
}


def on_rank_disagree(rank):
    world = World(CASE, rank)
    with ll_cases.make_ll_buffer(CASE, timeout_s=20.0) as buffer:
        for field, (changes, value) in DISAGREEMENTS.items():
            if changes == "hidden":
                changes = dict(x=world.xs[rank][:, :120].contiguous())
            arguments = change(world, **(changes if rank == 2 else {}))
            message = f"(?s)ranks disagree on the {field}.*rank 0 has .*rank 2 has {value}"
            with pytest.raises(EPConfigError, match=message):
                buffer.low_latency_dispatch(**arguments)
            ll_cases.check_round(buffer, world)
        result = ll_cases.dispatch(buffer, world)
        changed = World(replace(CASE, wire="fp8"), rank) if rank == 2 else world
        with pytest.raises(EPConfigError, match="wire_format: rank 0 has bf16, rank 2 has fp8"):
            ll_cases.combine(buffer, changed, result.handle)
        combine = functools.partial(ll_cases.combine, buffer, world, result.handle)
        call = buffer.barrier if rank == 2 else combine
        with pytest.raises(EPConfigError, match="operation: rank 0 has combine, rank 2 has barr"):
            call()
        ll_cases.check_combine(ll_cases.combine(buffer, world, result.handle), world)


def test_ranks_that_disagree_all_learn_both_values(rank_pool):
    rank_pool.get(3).run(on_rank_disagree)


def on_rank_constructor(rank):
    for bytes_, message in [
        (-1, "low_latency_bytes=-1"),
        (1.5, "low_latency_bytes=1.5"),
        (100, "low_latency_bytes=100 leaves no room"),
        (CASE.hint + rank, "ranks disagree on low_latency_bytes"),
    ]:
        with pytest.raises(EPConfigError, match=message):
            cases.make_buffer(ll_cases.backend(), num_experts=6, low_latency_bytes=bytes_)
    with cases.make_buffer(ll_cases.backend(), num_experts=6) as buffer:
        world = World(CASE, rank)
        with pytest.raises(EPConfigError, match="low_latency_bytes=0"):
            ll_cases.dispatch(buffer, world)
    buffer = ll_cases.make_ll_buffer(CASE)
    with pytest.raises(EPConfigError, match=f"rank={rank} is this rank"):
        buffer.mask_rank(rank)
    with pytest.raises(EPConfigError, match="rank=3 is out of range"):
        buffer.mask_rank(3)
    first = ll_cases.dispatch(buffer, world)
    late = ll_cases.dispatch(buffer, world, return_recv_hook=True)
    buffer.barrier()
    buffer.destroy()
    for call in (
        late.hook,
        buffer.clear_masks,
        buffer.query_mask,
        lambda: ll_cases.dispatch(buffer, world),
        lambda: ll_cases.combine(buffer, world, first.handle),
    ):
        with pytest.raises(EPConfigError, match="destroyed"):
            call()


def on_rank_nodes(rank):
    with pytest.raises(EPConfigError, match="mask_silent_ranks=True: the group spans 2 nodes"):
        ll_cases.make_ll_buffer(
            replace(CASE, num_ranks=2), num_local_ranks=1, mask_silent_ranks=True
        )
    with (
        ll_cases.make_ll_buffer(replace(CASE, num_ranks=2), num_local_ranks=1) as buffer,
        pytest.raises(EPConfigError, match=f"rank={1 - rank}: .* within one node only"),
    ):
        buffer.mask_rank(1 - rank)


def test_ranks_of_several_nodes_cannot_be_masked(rank_pool):
    rank_pool.get(2).run(on_rank_nodes)


def test_the_region_and_a_destroyed_buffer(rank_pool):
    rank_pool.get(3).run(on_rank_constructor)


def on_rank_other_buffer(rank):
    world = World(CASE, rank)
    with ll_cases.make_ll_buffer(CASE) as one, ll_cases.make_ll_buffer(CASE) as other:
        result = ll_cases.dispatch(one, world)
        with pytest.raises(EPConfigError, match="made by another buffer"):
            ll_cases.combine(other, world, result.handle)
        ll_cases.check_combine(ll_cases.combine(one, world, result.handle), world)


def test_a_handle_belongs_to_its_buffer(rank_pool):
    rank_pool.get(3).run(on_rank_other_buffer)


@pytest.mark.parametrize("name", ["num_max_tokens_per_rank", "hidden", "num_ranks", "num_experts"])
def test_the_size_hint_refuses_what_is_no_size(name):
    sizes = dict(num_max_tokens_per_rank=1, hidden=8, num_ranks=1, num_experts=1)
    with pytest.raises(EPConfigError, match=f"{name}=0"):
        Buffer.low_latency_size_hint(**sizes | {name: 0})


@pytest.mark.parametrize("name", ["num_max_tokens_per_rank", "hidden", "num_ranks", "num_experts"])
def test_the_size_hint_refuses_what_no_region_has(name):
    sizes = dict(
        num_max_tokens_per_rank=1 << 20, hidden=1 << 17, num_ranks=256, num_experts=1 << 14
    )
    assert 0 < Buffer.low_latency_size_hint(**sizes, num_local_experts=1 << 14) < 1 << 63
    with pytest.raises(EPConfigError, match=f"{name}=4611686018427387904"):
        Buffer.low_latency_size_hint(**sizes | {name: 1 << 62})
