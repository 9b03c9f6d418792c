"""Bad input raises before anything is sent, on every rank that it concerns, and names the argument
and its value; ranks that disagree all learn about what; the buffer works afterwards.
"""

import os
import re
import time
from unittest import mock

import cases
import pytest
import torch
from backends import backends
from cases import Case, World
from host_view import on_host

from ep_kernels import reference
from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError, EPDeviceError, EPError
from ep_kernels.event import Event
from ep_kernels.testing import assert_bitwise_equal

THREE_RANKS = pytest.mark.parametrize("num_ranks", [3])
CASE = Case(num_ranks=3, num_tokens=(6, 4, 9), num_topk=3, hidden=16)


def change(**values):
    """A change of a call's arguments: constants, or functions of the argument that was there."""

    def apply(arguments):
        for name, value in values.items():
            arguments[name] = value(arguments.get(name)) if callable(value) else value

    return apply


def put(value, *index):
    """Sets one element."""

    def apply(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return apply


def strided(tensor):
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def fp8_pair(x):
    return x.to(torch.float8_e4m3fn), torch.ones(len(x), 1)


# name -> (change of a good call, what the message must contain)
BAD_DISPATCH = {
    "x-int32": (change(x=lambda x: x.to(torch.int32)), "x.*int32"),
    "x-none": (change(x=None), "x.*None"),
    "x-device": (change(x=lambda x: x.to("meta")), "x.*meta"),
    "x-1d": (change(x=lambda x: x[0]), r"x.*shape.*16"),
    "x-3d": (change(x=lambda x: x[None]), r"x.*shape.*1, \d+, 16"),
    "x-strided": (change(x=strided), "x.*contiguous"),
    "x-transposed": (change(x=lambda x: torch.empty(16, len(x)).to(x).t()), "x.*contiguous"),
    "x-14-bytes": (change(x=lambda x: x[:, :7].contiguous()), r"x.*7\b.*14 bytes"),
    "x-0-bytes": (change(x=lambda x: x[:, :0].contiguous()), r"x.*0\b.*bytes"),
    "x-triple": (change(x=lambda x: (x, x, x)), "x.*3"),
    "x-rows": (change(x=lambda x: x[:-1]), r"(x|topk_idx).*shape"),
    "fp8-bf16-pair": (change(x=lambda x: (x, torch.ones(len(x), 1))), r"(x|scales).*bfloat16"),
    "scales-fp16": (change(x=lambda x: (fp8_pair(x)[0], torch.ones(len(x), 1).half())), "float16"),
    "scales-rows": (change(x=lambda x: (fp8_pair(x)[0], torch.ones(len(x) + 1, 1))), "shape"),
    "scales-none-per-row": (change(x=lambda x: (fp8_pair(x)[0], torch.ones(len(x), 0))), r"0\b"),
    "topk_idx-none": (change(topk_idx=None), "topk_idx.*None"),
    "topk_idx-int32": (change(topk_idx=lambda t: t.to(torch.int32)), "topk_idx.*int32"),
    "topk_idx-device": (change(topk_idx=lambda t: t.to("meta")), "topk_idx.*meta"),
    "topk_idx-1d": (change(topk_idx=lambda t: t[:, 0].contiguous()), r"topk_idx.*shape"),
    "topk_idx-strided": (change(topk_idx=strided), "topk_idx.*contiguous"),
    "topk_idx-too-large": (change(topk_idx=put(6, 2, 1)), r"topk_idx\[2, 1\]=6\b.*num_experts=6"),
    "topk_idx-huge": (change(topk_idx=put(2**32, 3, 2)), r"topk_idx\[3, 2\]=4294967296\b"),
    "topk_idx-minus-2": (change(topk_idx=put(-2, 0, 0)), r"topk_idx\[0, 0\]=-2\b"),
    "topk_idx-twice": (
        change(topk_idx=put(torch.tensor([4, 1, 4]), 1)),
        r"topk_idx\[1\].*\b4\b.*twice",
    ),
    "topk_idx-no-k": (
        change(topk_idx=lambda t: t[:, :0].contiguous(), topk_weights=None),
        r"num_topk=0\b",
    ),
    "topk_idx-k-over-e": (
        change(topk_idx=lambda t: torch.full((len(t), 7), -1), topk_weights=None),
        r"num_topk=7\b.*num_experts=6",
    ),
    "topk_weights-fp16": (change(topk_weights=lambda t: t.half()), "topk_weights.*float16"),
    "topk_weights-shape": (
        change(topk_weights=lambda t: t[:, :2].contiguous()),
        r"topk_weights.*shape.*\b2\b",
    ),
    "topk_weights-strided": (change(topk_weights=strided), "topk_weights.*contiguous"),
    "topk_weights-device": (change(topk_weights=lambda t: t.to("meta")), "topk_weights.*meta"),
    "layout-text": (change(layout="rank_major"), "layout='rank_major'"),
    "expert_alignment-0": (change(expert_alignment=0), r"expert_alignment=0\b"),
    "expert_alignment-negative": (change(expert_alignment=-8), r"expert_alignment=-8\b"),
    "expert_alignment-float": (change(expert_alignment=8.0), r"expert_alignment=8\.0"),
    "capacity-negative": (change(capacity=-1), r"capacity=-1\b"),
    "capacity-float": (change(capacity=1e3), r"capacity=1000\.0"),
    "num_sms-0": (change(num_sms=0), r"num_sms=0\b"),
    "handle-and-topk_idx": (change(handle=lambda _: "own"), "topk_idx"),
    "recv-stats-shape": (
        change(cumulative_recv_stats=torch.zeros(3, dtype=torch.int32)),
        r"cumulative_recv_stats.*shape.*\b3\b",
    ),
    "recv-stats-fp32": (
        change(cumulative_recv_stats=torch.zeros(2)),
        "cumulative_recv_stats.*float32",
    ),
    "recv-stats-device": (
        change(cumulative_recv_stats=torch.zeros(2, dtype=torch.int64, device="meta")),
        "cumulative_recv_stats.*meta",
    ),
    "wait-stats-int32": (
        change(wait_recv_cost_stats=torch.zeros(3, dtype=torch.int32)),
        "wait_recv_cost_stats.*int32",
    ),
}

BAD_CACHED_DISPATCH = {
    "handle-text": (change(handle="a handle"), "handle.*a handle"),
    "handle-of-another-buffer": (change(handle="other"), "handle.*another buffer"),
    "x-rows": (change(x=lambda x: x[:-1]), r"x.*shape"),
    "topk_weights-shape": (
        change(topk_weights=lambda t: torch.ones(1, 1)),
        r"topk_weights.*shape.*\b1\b",
    ),
    "recv-stats-list": (change(cumulative_recv_stats=[0, 0]), r"cumulative_recv_stats.*\[0, 0\]"),
}

BAD_COMBINE = {
    "x-int64": (change(x=lambda x: x.to(torch.int64)), "x.*int64"),
    "x-fp8": (change(x=lambda x: x.to(torch.float8_e4m3fn)), "x.*float8_e4m3fn"),
    "x-device": (change(x=lambda x: x.to("meta")), "x.*meta"),
    "x-rows": (change(x=lambda x: torch.cat([x, x[:1]])), r"x.*shape"),
    "x-strided": (change(x=strided), "x.*contiguous"),
    "x-12-bytes": (change(x=lambda x: x[:, :6].contiguous()), r"x.*6\b.*12 bytes"),
    "handle-none": (change(handle=None), "handle.*None"),
    "handle-of-another-buffer": (change(handle="other"), "handle.*another buffer"),
    "topk_weights-shape": (
        change(topk_weights=lambda t: t[:, :1].contiguous()),
        r"topk_weights.*shape",
    ),
    "topk_weights-bf16": (change(topk_weights=lambda t: t.bfloat16()), "topk_weights.*bfloat16"),
    "bias-dtype": (change(bias=lambda b: b.float()), "bias.*float32"),
    "bias-shape": (change(bias=lambda b: b[:-1]), "bias.*shape"),
    "bias-strided": (change(bias=strided), "bias.*contiguous"),
    "bias-triple": (change(bias=lambda b: (b, b, b)), "bias.*3"),
    "bias-second-of-pair": (change(bias=lambda b: (b, b[:, :8].contiguous())), r"bias.*shape.*8"),
    "num_sms-negative": (change(num_sms=-4), r"num_sms=-4\b"),
    "wait-stats-shape": (
        change(wait_recv_cost_stats=torch.zeros(2, dtype=torch.int64)),
        r"wait_recv_cost_stats.*shape.*\b2\b",
    ),
}

BAD = {"dispatch": BAD_DISPATCH, "cached_dispatch": BAD_CACHED_DISPATCH, "combine": BAD_COMBINE}

# name -> (operation, change on one rank, what every rank's message must contain)
DISAGREEMENTS = {
    "dtype": ("dispatch", change(x=lambda x: x.to(torch.float16)), "dtype.*bfloat16.*float16"),
    "fp8": ("dispatch", change(x=fp8_pair), "dtype.*bfloat16.*float8_e4m3fn"),
    "hidden": (
        "dispatch",
        change(x=lambda x: x[:, :8].contiguous()),
        r"(hidden.*\b16\b.*\b8\b)|(bytes per row.*\b32\b.*\b16\b)",
    ),
    "num_topk": (
        "dispatch",
        change(
            topk_idx=lambda t: t[:, :2].contiguous(), topk_weights=lambda t: t[:, :2].contiguous()
        ),
        r"num_topk.*\b3\b.*\b2\b",
    ),
    "topk_weights": ("dispatch", change(topk_weights=None), "topk_weight"),
    "topk_weights-dtype": (
        "dispatch",
        change(topk_weights=lambda t: t.double()),
        r"topk_weight.*(float32.*float64|\b4\b.*\b8\b)",
    ),
    "layout": ("dispatch", change(layout=Layout.EXPERT_MAJOR), "layout.*RANK_MAJOR.*EXPERT_MAJOR"),
    "expert_alignment": (
        "dispatch",
        change(expert_alignment=16),
        r"expert_alignment.*\b1\b.*\b16\b",
    ),
    "capacity": ("dispatch", change(capacity=100), "capacity"),
    "cached-and-fresh": (
        "dispatch",
        change(handle=lambda _: "own", topk_idx=None),
        "(operation|handle)",
    ),
    "combine-dtype": (
        "combine",
        change(x=lambda x: x.float(), bias=None),
        "dtype.*bfloat16.*float32",
    ),
    "combine-hidden": (
        "combine",
        change(x=lambda x: x[:, :8].contiguous(), bias=None),
        r"(hidden.*\b16\b.*\b8\b)|(bytes per row.*\b32\b.*\b16\b)",
    ),
    "combine-weights": ("combine", change(topk_weights=None), "topk_weight"),
    "combine-handle": ("combine", change(handle="second"), "handle"),
}


def good_arguments(operation, world, handles):
    """Arguments of a call that works; "own" and the like stand for handles in changes."""
    rank = world.rank
    if operation == "combine":
        return dict(
            x=world.ys()[rank],
            handle=handles["own"],
            topk_weights=world.recv_weights(rank),
            bias=world.bias(),
        )
    arguments = dict(x=world.xs()[rank], topk_weights=world.topk_weights[rank])
    if operation == "dispatch":
        return dict(arguments, topk_idx=world.topk_idxs[rank], **world.case.dispatch_options)
    return dict(arguments, handle=handles["own"])


def call(buffer, operation, arguments, handles):
    arguments = dict(arguments)
    handle = arguments.get("handle")
    if isinstance(handle, str):
        arguments["handle"] = handles.get(handle, handle)
    method = buffer.combine if operation == "combine" else buffer.dispatch
    return method(**arguments)


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except EPError as error:
        return error
    raise AssertionError("no error")


def check_message(error, pattern, kind=EPConfigError):
    assert isinstance(error, kind), repr(error)
    assert re.search(pattern, str(error)), f"{str(error)!r} does not match {pattern!r}"


def make_handles(buffer, other, world):
    xs = world.xs()
    return {
        "own": cases.dispatch(buffer, world, xs).handle,
        "second": cases.dispatch(buffer, world, xs).handle,
        "other": cases.dispatch(other, world, xs).handle,
    }


def on_rank_bad_calls(rank, backend, operation, bad_ranks):
    """Each bad call of the table, followed by good ones."""
    world = World(CASE, rank)
    with (
        cases.make_buffer(backend, case=CASE) as buffer,
        cases.make_buffer(backend, case=CASE) as other,
    ):
        handles = make_handles(buffer, other, world)
        for name, (apply, pattern) in BAD[operation].items():
            arguments = good_arguments(operation, world, handles)
            if rank in bad_ranks:
                apply(arguments)
            error = error_of(call, buffer, operation, arguments, handles)
            own = rank in bad_ranks
            expected = pattern if own else rf"rank ({'|'.join(map(str, bad_ranks))})\b.*({pattern})"
            check_message(error, f"(?s){expected}", EPConfigError)
            assert isinstance(error, ValueError)
            try:
                cases.check_round_trip(buffer, world)
            except Exception as later:
                raise AssertionError(f"after the bad call {name}: {later}") from later


@THREE_RANKS
@pytest.mark.parametrize("bad_ranks", [(1,), (2, 0), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("operation", list(BAD))
def test_a_bad_argument_is_named_on_all_ranks_and_the_buffer_works_afterwards(
    ranks, backend, num_ranks, operation, bad_ranks
):
    ranks.run(on_rank_bad_calls, backend, operation, bad_ranks)


class FailedCall:
    """A call of another buffer."""

    def is_finished(self):
        return True

    def wait(self):
        raise EPDeviceError("it has failed")


def on_rank_bad_orders(rank, backend):
    """When a call is to run: refused on all ranks, also by what it is to run behind."""
    world = World(CASE, rank)
    with cases.make_buffer(backend, case=CASE) as buffer:
        handle = cases.dispatch(buffer, world, world.xs()).handle
        for operation in ("dispatch", "combine"):
            for order, pattern in (
                (dict(async_op=None), "async_op=None"),
                (dict(async_op=1), "async_op=1"),
                (dict(previous_event=True), "previous_event=True"),
                (dict(previous_event=Event(FailedCall())), "(previous_event: )?it has failed"),
            ):
                options = order if rank == 1 else {}
                if operation == "dispatch":
                    call = buffer.dispatch, world.xs()[rank], world.topk_idxs[rank]
                else:
                    call = buffer.combine, world.ys()[rank], handle
                error = error_of(*call, **options)
                check_message(error, pattern if rank == 1 else f"rank 1 .*{pattern}", EPError)
                cases.check_round_trip(buffer, world)
        error = error_of(buffer.refuse, "no") if rank == 1 else error_of(*call)
        check_message(error, "no" if rank == 1 else "rank 1 refused this call: no")


@THREE_RANKS
@backends("cpu", "nodes", "cuda")
def test_when_a_call_is_to_run_is_checked_on_all_ranks(ranks, backend, num_ranks):
    ranks.run(on_rank_bad_orders, backend)


def on_rank_disagreement(rank, backend, operation, apply_name, odd_rank):
    world = World(CASE, rank)
    _, apply, pattern = DISAGREEMENTS[apply_name]
    with (
        cases.make_buffer(backend, case=CASE) as buffer,
        cases.make_buffer(backend, case=CASE) as other,
    ):
        handles = make_handles(buffer, other, world)
        for _ in range(2):
            arguments = good_arguments(operation, world, handles)
            if rank == odd_rank:
                apply(arguments)
            error = error_of(call, buffer, operation, arguments, handles)
            check_message(error, f"(?s){pattern}")
            assert re.search(rf"rank {odd_rank}\b", str(error)), str(error)
            cases.check_round_trip(buffer, world)


@THREE_RANKS
@pytest.mark.parametrize("name", list(DISAGREEMENTS))
def test_ranks_that_disagree_all_learn_the_field_and_both_values(ranks, backend, num_ranks, name):
    ranks.run(on_rank_disagreement, backend, DISAGREEMENTS[name][0], name, 2)


def on_rank_scales_disagree(rank, backend):
    """fp32 and int32 scales have the same size; whoever reads them would not notice."""
    case = Case(num_ranks=3, dtype="fp8", hidden=256)
    world = World(case, rank)
    with cases.make_buffer(backend, case=case) as buffer:
        for odd_scales in (lambda s: s.view(torch.int32), lambda s: s[:, :1].contiguous()):
            x, scales = world.xs()[rank]
            scales = odd_scales(scales) if rank == 1 else scales
            error = error_of(buffer.dispatch, (x, scales), world.topk_idxs[rank])
            check_message(error, "scales.*")
            cases.check_round_trip(buffer, world)


@THREE_RANKS
def test_ranks_agree_on_dtype_and_number_of_scales(ranks, backend, num_ranks):
    ranks.run(on_rank_scales_disagree, backend)


def on_rank_different_operations(rank, backend):
    world = World(CASE, rank)
    with cases.make_buffer(backend, case=CASE) as buffer:
        handle = cases.dispatch(buffer, world, world.xs()).handle
        operations = {
            "dispatch": lambda: cases.dispatch(buffer, world, world.xs()),
            "combine": lambda: buffer.combine(world.ys()[rank], handle),
            "barrier": buffer.barrier,
        }
        for most, one in (("dispatch", "combine"), ("combine", "barrier"), ("barrier", "dispatch")):
            error = error_of(operations[one if rank == 1 else most])
            check_message(
                error, rf"operation.*{most}.*rank 1.*{one}|operation.*{most}.*{one}.*rank 1"
            )
            cases.check_round_trip(buffer, world)


@THREE_RANKS
def test_ranks_that_call_different_operations_all_learn_which(ranks, backend, num_ranks):
    ranks.run(on_rank_different_operations, backend)


def on_rank_bad_layout_call(rank, backend):
    """get_dispatch_layout does not communicate: only the rank that calls it raises."""
    world = World(CASE, rank)
    with cases.make_buffer(backend, case=CASE) as buffer:
        if rank == 0:
            for bad, pattern in (
                (world.topk_idxs[0].int(), "topk_idx.*int32"),
                (world.topk_idxs[0][0], "topk_idx.*shape"),
            ):
                check_message(error_of(buffer.get_dispatch_layout, bad), pattern)
            for value in (6, 2**32, -2):
                bad = put(value, 0, 0)(world.topk_idxs[0])
                if backend == "cuda":  # where looking at values takes a synchronisation
                    good = put(-1, 0, 0)(bad)
                    want = reference.get_dispatch_layout(good, world.placement)
                    assert_bitwise_equal(buffer.get_dispatch_layout(bad), want)
                else:
                    error = error_of(buffer.get_dispatch_layout, bad)
                    check_message(error, rf"topk_idx\[0, 0\]={value}\b")
        cases.check_round_trip(buffer, world)


@THREE_RANKS
def test_get_dispatch_layout_checks_its_argument(ranks, backend, num_ranks):
    ranks.run(on_rank_bad_layout_call, backend)


# Constructor: name -> (arguments of rank 1, what every rank's message must contain)
BAD_CONSTRUCTORS = {
    "num_experts-0": (dict(num_experts=0), "num_experts=0"),
    "num_experts-indivisible": (dict(num_experts=7), "num_experts=7.*num_ranks=3"),
    "num_experts-text": (dict(num_experts="six"), "num_experts='six'"),
    "expert_to_rank-short": (dict(expert_to_rank=torch.tensor([0, 1])), r"expert_to_rank.*\b2\b"),
    "expert_to_rank-outside": (
        dict(expert_to_rank=torch.tensor([0, 1, 2, 3, 0, 1])),
        r"expert_to_rank\[3\]=3\b",
    ),
    "device": (dict(device="meta"), "device.*meta"),
    "timeout_s": (dict(timeout_s=0.0), r"timeout_s=0\.0"),
    "num_sms": (dict(num_sms=0), r"num_sms=0\b"),
}

# What the reference takes as it is.
OUT_OF_RANGE_CONSTRUCTORS = {
    "timeout_s-endless": (dict(timeout_s=float("inf")), r"timeout_s=inf is more than 1e\+07"),
    "num_sms-half": (dict(num_sms=0.5), r"num_sms=0\.5 is not a whole number"),
    "num_sms-huge": (dict(num_sms=10**7), "num_sms=10000000 is more than 1024"),
    "pool_bytes-infinite": (dict(pool_bytes=float("inf")), "pool_bytes=inf"),
    "pool_bytes-huge": (dict(pool_bytes=2**64 + 65536), "pool_bytes=18446744073709617152"),
    "expert_to_rank-fractions": (dict(expert_to_rank=[0.9] * 6), r"expert_to_rank=\[0\.9"),
}

DIFFERENT_CONSTRUCTORS = {
    "num_experts": (dict(num_experts=9), r"num_experts.*\b6\b.*\b9\b"),
    "expert_to_rank": (dict(expert_to_rank=torch.tensor([2, 1, 0, 0, 1, 2])), "expert_to_rank"),
}


def construct(backend, **options):
    if backend == "reference":
        return reference.Buffer(**options)
    import ep_kernels

    return ep_kernels.Buffer(**options)


def on_rank_bad_constructors(rank, backend, table):
    for arguments, pattern in globals()[table].values():
        good = dict(num_experts=6)
        if rank == 1:
            error = error_of(construct, backend, **dict(good, **arguments))
        else:
            error = error_of(construct, backend, **good)
            assert "rank 1" in str(error), str(error)
        check_message(error, pattern)
        with cases.make_buffer(backend, case=CASE) as buffer:
            cases.check_round_trip(buffer, World(CASE, rank))


@THREE_RANKS
@pytest.mark.parametrize("table", ["BAD_CONSTRUCTORS", "DIFFERENT_CONSTRUCTORS"])
def test_a_bad_constructor_argument_is_named_on_all_ranks(ranks, backend, num_ranks, table):
    ranks.run(on_rank_bad_constructors, backend, table)


@THREE_RANKS
@backends("cpu", "cuda")
def test_a_constructor_argument_out_of_range_is_named_on_all_ranks(ranks, backend, num_ranks):
    ranks.run(on_rank_bad_constructors, backend, "OUT_OF_RANGE_CONSTRUCTORS")


def on_rank_default_pool(rank):
    """Machines of a group have a little more or less memory."""
    import ep_kernels

    num_bytes = (56 if rank == 1 else 64) << 20
    with mock.patch.dict(os.environ, EP_KERNELS_POOL_BYTES=str(num_bytes)):
        with ep_kernels.Buffer(num_experts=6) as buffer:
            check_message(
                error_of(buffer.empty, 60 << 20, dtype=torch.uint8), "pool", EPDeviceError
            )
            assert buffer.empty([2, 3], dtype=torch.int32).shape == (2, 3)
            error = error_of(buffer.empty, 1 << 61, 8, dtype=torch.uint8)
            check_message(error, "shape=.2305843009213693952, 8. is more than any pool")
        error = error_of(ep_kernels.Buffer, num_experts=6, pool_bytes=num_bytes)
        check_message(error, "ranks disagree on pool_bytes: rank 0 has 67108864, rank 1")


@THREE_RANKS
def test_pools_of_the_default_size_are_the_smallest_default(ranks, num_ranks):
    ranks.run(on_rank_default_pool)


def test_a_buffer_without_a_process_group_says_what_is_missing():
    import ep_kernels

    with pytest.raises(EPConfigError, match="init_process_group"):
        ep_kernels.Buffer(num_experts=4)
    with pytest.raises(EPConfigError, match="group='gloo'"):
        ep_kernels.Buffer("gloo", num_experts=4)


def on_rank_use_after_destroy(rank, backend):
    world = World(CASE, rank)
    buffer = cases.make_buffer(backend, case=CASE)
    handle = cases.check_round_trip(buffer, world).handle
    buffer.destroy()
    buffer.destroy()
    for use in (
        lambda: cases.dispatch(buffer, world, world.xs()),
        lambda: buffer.dispatch(world.xs()[rank], handle=handle),
        lambda: buffer.combine(world.ys()[rank], handle),
        lambda: buffer.get_dispatch_layout(world.topk_idxs[rank]),
        lambda: buffer.empty(3, 4, dtype=torch.float32),
        buffer.barrier,
    ):
        check_message(error_of(use), "destroyed", EPError)
    with cases.make_buffer(backend, case=CASE) as new:
        check_message(error_of(new.combine, world.ys()[rank], handle), "handle.*another buffer")
        cases.check_round_trip(new, world)


@THREE_RANKS
def test_use_after_destroy_is_refused(ranks, backend, num_ranks):
    ranks.run(on_rank_use_after_destroy, backend)


def on_rank_async_errors(rank, backend, case):
    """Asynchronous calls report a peer's refusal when they are waited for, or at once."""
    world = World(case, rank)
    with cases.make_buffer(backend, case=case) as made:
        buffer = cases.device_results(made)
        handle = cases.dispatch(buffer, world, world.xs()).handle

        def start_and_wait(bad):
            x = world.ys()[rank]
            result = buffer.combine(x[:-1] if bad else x, handle, async_op=True)
            error = error_of(result.event.wait)
            assert result.event.query()
            check_message(error_of(result.event.wait), "rank 1")  # each time
            raise error

        for _ in range(3):
            error = error_of(start_and_wait, rank == 1)
            check_message(error, "x.*shape" if rank == 1 else r"(?s)rank 1\b.*x.*shape")
        cases.check_round_trip(made, world)


@THREE_RANKS
@backends("cpu", "cuda")
def test_the_event_of_an_asynchronous_call_raises_its_error(ranks, backend, num_ranks):
    ranks.run(on_rank_async_errors, backend, CASE)


def on_rank_many_refusals(rank, backend):
    """Rank 1 does not wait for the others when it refuses; they come late, to every refusal."""
    world = World(CASE, rank)
    with cases.make_buffer(backend, case=CASE) as buffer:
        handle = cases.dispatch(buffer, world, world.xs()).handle
        time.sleep(0 if rank == 1 else 0.1)
        for i in range(30):
            num_sms = -i if rank == 1 else None
            error = error_of(buffer.combine, world.ys()[rank], handle, num_sms=num_sms)
            check_message(
                error, rf"num_sms=-?{i}\b" if rank == 1 else rf"rank 1\b.*num_sms=-?{i}\b"
            )
        cases.check_round_trip(buffer, world)


@THREE_RANKS
def test_a_rank_may_refuse_many_calls_before_the_others_make_them(ranks, backend, num_ranks):
    ranks.run(on_rank_many_refusals, backend)


def on_rank_error_behind_calls(rank, backend, kind):
    """Many rows of rank 2 are on their way when a later call is refused, or ranks disagree."""
    case = Case(num_ranks=3, num_tokens=(20, 30, 3000), hidden=7168, num_topk=3)
    world = World(case, rank)
    xs = [torch.full((n, case.hidden), 1.0 + i).bfloat16() for i, n in enumerate(case.num_tokens)]
    bad = dict(num_sms=-1) if kind == "refusal" else dict(expert_alignment=4)
    num_rows = world.rows[rank].num_rows
    with cases.make_buffer(backend, case=case, num_sms=1) as buffer:
        buffer = cases.device_results(buffer)
        for _ in range(3):
            result = buffer.dispatch(xs[rank], world.topk_idxs[rank], capacity=3050, async_op=True)
            few_rows = world.xs()[rank][:3], world.topk_idxs[rank][:3]
            error = error_of(buffer.dispatch, *few_rows, **(bad if rank == 2 else {}))
            check_message(error, "num_sms=-1|expert_alignment")
            result.event.wait()
            last_rows = on_host(result.recv_x[num_rows - 10 : num_rows].clone())  # at once
            assert (last_rows == xs[2][0]).all()
            result.recv_x.zero_()  # the same memory comes again
            buffer.barrier()


@THREE_RANKS
@pytest.mark.parametrize("kind", ["refusal", "disagreement"])
@backends("cpu", "cuda")
def test_an_error_does_not_disturb_the_calls_under_way(ranks, backend, num_ranks, kind):
    ranks.run(on_rank_error_behind_calls, backend, kind)


def on_rank_pool_full(rank, backend, case):
    """Everything goes to rank 1, whose pool is too small for it."""
    world = World(case, rank)
    x = torch.zeros(400, 4096)  # 6.5 MB on each rank
    topk_idx = torch.full((400, 1), 2)
    with cases.make_buffer(backend, case=case, pool_bytes=16 << 20) as buffer:
        for options in (dict(), dict(capacity=1200)):
            error = error_of(buffer.dispatch, x, topk_idx, **options)
            if rank == 1 or not options:
                check_message(error, "pool", EPDeviceError)
            if not options:
                check_message(error, "rank 1|" if rank == 1 else "rank 1", EPDeviceError)
            cases.check_round_trip(buffer, world)
        error = error_of(buffer.empty, 1 << 30, dtype=torch.float32)
        check_message(error, "pool", EPDeviceError)
        cases.check_round_trip(buffer, world)


@THREE_RANKS
@backends("cpu", "cuda")
def test_a_full_pool_is_an_error_on_all_ranks_and_the_buffer_works_afterwards(
    ranks, backend, num_ranks
):
    ranks.run(on_rank_pool_full, backend, CASE)


def on_rank_error_that_nobody_waits_for(rank, backend, case):
    """Rank 1 has no memory; the others learn it at their next call, and rank 1 with them."""
    world = World(case, rank)
    x, topk_idx = torch.zeros(400, 4096), torch.full((400, 1), 2)
    with cases.make_buffer(backend, case=case, pool_bytes=16 << 20, timeout_s=20.0) as made:
        buffer = cases.device_results(made)
        for _ in range(2):
            if rank == 1:
                check_message(error_of(buffer.dispatch, x, topk_idx), "pool", EPDeviceError)
            else:
                buffer.dispatch(x, topk_idx)
                torch.cuda.synchronize()
            error = error_of(cases.dispatch, made, world, world.xs())
            pattern = "rank 0 refused.*an earlier call failed" if rank == 1 else "rank 1.*pool"
            check_message(error, pattern, EPError)
            cases.check_round_trip(made, world)


@THREE_RANKS
@backends("cuda")
def test_ranks_stay_in_step_when_nobody_waits_for_an_event(ranks, backend, num_ranks):
    ranks.run(on_rank_error_that_nobody_waits_for, backend, CASE)


def on_rank_wrong_device(rank, case):
    """Tensors of the CPU for a buffer of a GPU."""
    world = World(case, rank)
    with cases.make_buffer("cuda", case=case) as buffer:
        x, topk_idx = world.xs()[rank].to(buffer.device), world.topk_idxs[rank].to(buffer.device)
        handle = buffer.unwrapped.dispatch(x, topk_idx).handle
        for name, call in (
            ("x", lambda: buffer.unwrapped.dispatch(x.cpu(), topk_idx)),
            ("topk_idx", lambda: buffer.unwrapped.dispatch(x, topk_idx.cpu())),
            ("x", lambda: buffer.unwrapped.combine(world.ys()[rank], handle)),
            ("topk_idx", lambda: buffer.unwrapped.get_dispatch_layout(topk_idx.cpu())),
        ):
            check_message(error_of(call), f"{name}.*cpu")
        cases.check_round_trip(buffer, world)


@THREE_RANKS
@pytest.mark.gpu(1)
def test_tensors_on_the_cpu_are_refused_by_a_buffer_on_a_gpu(ranks, num_ranks):
    ranks.run(on_rank_wrong_device, CASE)


def on_rank_too_many_rows(rank, backend):
    """Only rank 1 would receive them."""
    num_chosen, num_topk = 2048, 128  # with their padding, 2^31 rows
    case = Case(num_ranks=2, num_experts=2 * num_chosen)
    topk_idx = (num_chosen + torch.arange(num_chosen)).view(-1, num_topk)
    x = torch.zeros(len(topk_idx), 16)
    with cases.make_buffer(backend, case=case, timeout_s=30.0) as buffer:
        for capacity in (None, 10):
            start = time.monotonic()
            with pytest.raises(EPConfigError, match="rank 1 would receive 2147483648 rows"):
                buffer.dispatch(
                    x,
                    topk_idx,
                    layout=Layout.EXPERT_MAJOR,
                    expert_alignment=1 << 20,
                    capacity=capacity,
                )
            assert time.monotonic() - start < 10
        buffer.barrier()


# NOTE: a rank of a GPU has too few experts for that many rows of padding.
@backends("cpu", "nodes")
def test_more_rows_than_can_be_numbered_are_refused_on_all_ranks(ranks, backend):
    ranks.run(on_rank_too_many_rows, backend)


def on_rank_many_rows(rank, backend):
    """Groups of 2 rows each that begin 2^20 rows apart."""
    num_local, num_topk, alignment = 1024, 128, 1 << 20
    case = Case(num_ranks=2, num_experts=2 * num_local)
    topk_idx = (num_local + torch.arange(num_local)).view(-1, num_topk)
    x = torch.ones(len(topk_idx), 16)
    with cases.make_buffer(backend, case=case) as buffer:
        result = buffer.dispatch(
            x, topk_idx, layout=Layout.EXPERT_MAJOR, expert_alignment=alignment, capacity=10
        )
        num_rows = 0 if rank == 0 else alignment
        want = torch.arange(num_local + 1) * num_rows
        assert_bitwise_equal(result.expert_offsets, want, name="expert_offsets")
        assert result.num_overflow.item() == (0 if rank == 0 else 2 * num_local - 2)
        assert (result.recv_x[:2] == 1).all() or rank == 0


@backends("cpu", "nodes", "cuda")
def test_groups_may_begin_at_any_row_that_can_be_numbered(ranks, backend):
    ranks.run(on_rank_many_rows, backend)
