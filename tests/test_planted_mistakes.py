"""The conformance checks notice mistakes: each of these, planted into the reference Buffer, has to
make a check fail on at least one rank.
"""

from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import cases
import pytest
import torch
from cases import Case, World

from ep_kernels import reference
from ep_kernels.config import Layout
from ep_kernels.reference import spec

BY_RANK = Case(num_ranks=3, num_topk=4, num_tokens=(21, 34, 13))
BY_EXPERT = replace(BY_RANK, layout=Layout.EXPERT_MAJOR, expert_alignment=8)
LIMITED = replace(BY_EXPERT, capacity=(70, 40, 0))


def edit(field, function):
    """A mistake in one field of a result."""

    def plant(result):
        value = getattr(result, field).clone()
        return replace(result, **{field: function(value)})

    return plant


def put(value, *index):
    def apply(tensor):
        tensor[index] = value
        return tensor

    return apply


def flip_bit(tensor):
    tensor.view(torch.uint8)[5, -1] ^= 1
    return tensor


def swap_rows(tensor):
    tensor[[3, 11]] = tensor[[11, 3]]
    return tensor


def swap_local_experts(topk_idx):
    return torch.where(topk_idx < 0, topk_idx, 1 - topk_idx)


# name -> (case, change of every dispatch result)
IN_DISPATCH = {
    "two rows swapped": (BY_RANK, edit("recv_x", swap_rows)),
    "rows shifted by one": (BY_RANK, edit("recv_x", lambda x: x.roll(1, dims=0))),
    "a row dropped": (BY_RANK, edit("recv_x", put(0, 7))),
    "one bit": (BY_RANK, edit("recv_x", flip_bit)),
    "one bit of fp8": (replace(BY_RANK, dtype="fp8"), edit("recv_x", flip_bit)),
    "one bit of a scale": (replace(BY_RANK, dtype="fp8"), edit("recv_scales", flip_bit)),
    "a row too many": (BY_RANK, edit("recv_x", lambda x: torch.cat([x, x[:1]]))),
    "global expert ids": (BY_RANK, edit("recv_topk_idx", lambda t: torch.where(t < 0, t, t + 2))),
    "swapped local experts": (BY_RANK, edit("recv_topk_idx", swap_local_experts)),
    "a weight of another rank": (BY_RANK, edit("recv_topk_weights", lambda w: w + (w == 0) * 0.1)),
    "weights shifted by one": (BY_EXPERT, edit("recv_topk_weights", lambda w: w.roll(1))),
    "a wrong offset": (BY_EXPERT, edit("expert_offsets", put(9, 1))),
    "counts with padding": (
        BY_EXPERT,
        edit("num_recv_tokens_per_expert", lambda n: (n + 7) // 8 * 8),
    ),
    "counts in int32": (BY_EXPERT, edit("num_recv_tokens_per_expert", lambda n: n.int())),
    "padding that is not zero": (
        BY_EXPERT,
        lambda r: edit("recv_x", put(1, r.handle.rows[r.handle.buffer.rank].src_rank < 0))(r),
    ),
    "overflow not counted": (LIMITED, edit("num_overflow", put(0, 0))),
    "overflow with padding": (LIMITED, edit("num_overflow", lambda n: n + (n > 0))),
    "counts cut by capacity": (
        LIMITED,
        edit("num_recv_tokens_per_expert", lambda n: n.minimum(torch.tensor(12))),
    ),
}


def patch_spec(name, wrong):
    """Replaces a function of the specification; `wrong` gets the right one first."""
    right = getattr(spec, name)

    def plant():
        return mock.patch.object(spec, name, lambda *args, **kwargs: wrong(right, *args, **kwargs))

    return plant


def combine_with(**changes):
    """A wrong combine: `changes` turn its arguments into wrong ones."""

    def wrong(right, xs, *args, **kwargs):
        for name, function in changes.items():
            if name == "xs":
                xs = [function(x) for x in xs]
            else:
                kwargs[name] = function(kwargs[name])
        return right(xs, *args, **kwargs)

    return patch_spec("combine", wrong)


def rounded_twice(right, xs, *args, **kwargs):
    bias = kwargs.pop("bias")
    result = right(xs, *args, bias=None, **kwargs)
    return replace(result, x=result.x + bias)


def from_first_row(right, *args, **kwargs):
    """A sum that starts from the first row, not from +0.0, can be -0.0."""
    result = right(*args, **kwargs)
    return replace(result, x=torch.where(result.x == 0, -0.0, result.x))


# name -> (case, mistake while a combine runs)
IN_COMBINE = {
    "sum in descending order": (BY_RANK, patch_spec("_steps", lambda f, *a: f(*a)[::-1])),
    "sum in descending order of k": (BY_EXPERT, patch_spec("_steps", lambda f, *a: f(*a)[::-1])),
    "a row not added": (BY_EXPERT, patch_spec("_steps", lambda f, *a: f(*a)[:-1])),
    "a row added twice": (BY_RANK, patch_spec("_steps", lambda f, *a: f(*a) + f(*a)[:1])),
    "two rows swapped": (BY_RANK, combine_with(xs=swap_rows)),
    "rows rounded before they are added": (
        replace(BY_RANK, dtype="fp32"),
        combine_with(xs=lambda x: x.bfloat16().float()),
    ),
    "no bias": (BY_RANK, combine_with(bias=lambda bias: None)),
    "biases in the wrong order": (
        replace(BY_RANK, num_biases=2, dtype="fp32"),
        combine_with(bias=lambda bias: bias[::-1]),
    ),
    "bias added after rounding": (BY_RANK, patch_spec("combine", rounded_twice)),
    "weights of the next choice": (
        BY_RANK,
        combine_with(topk_weights=lambda w: [part.roll(1, dims=1) for part in w]),
    ),
    "weights of the next row": (
        BY_EXPERT,
        combine_with(topk_weights=lambda w: [part.roll(1, dims=0) for part in w]),
    ),
    "a sum of -0.0": (BY_RANK, patch_spec("combine", from_first_row)),
}


class Mutant(reference.Buffer):
    """The reference with one mistake, in dispatch or in combine."""

    in_dispatch = staticmethod(lambda result: result)
    in_combine = staticmethod(ExitStack)

    def dispatch(self, *args, **kwargs):
        return self.in_dispatch(super().dispatch(*args, **kwargs))

    def combine(self, *args, **kwargs):
        with self.in_combine():
            return super().combine(*args, **kwargs)


def on_rank_mutant(rank, kind, name):
    """Whether this rank's checks noticed. Every rank makes all calls, whatever its checks say."""
    noticed = []

    def attempt(check, *args, **kwargs):
        try:
            check(*args, **kwargs)
        except AssertionError as error:
            noticed.append(str(error))

    tables = {"dispatch": IN_DISPATCH, "combine": IN_COMBINE, "none": {None: (BY_EXPERT, None)}}
    case, mistake = tables[kind][name]
    world = World(case, rank)
    with Mutant(num_experts=case.num_experts) as buffer:
        if mistake is not None:
            setattr(buffer, f"in_{kind}", mistake)
        xs = world.xs()
        result = cases.dispatch(buffer, world, xs)
        attempt(cases.check_dispatch_result, result, world, xs)
        attempt(cases.check_combine, buffer, world, result.handle)
    return noticed


THREE_RANKS = pytest.mark.parametrize("num_ranks", [3])


@THREE_RANKS
@pytest.mark.parametrize("name", list(IN_DISPATCH))
def test_a_mistake_in_dispatch_is_noticed(ranks, num_ranks, name):
    assert any(ranks.run(on_rank_mutant, "dispatch", name))


@THREE_RANKS
@pytest.mark.parametrize("name", list(IN_COMBINE))
def test_a_mistake_in_combine_is_noticed(ranks, num_ranks, name):
    assert any(ranks.run(on_rank_mutant, "combine", name))


@THREE_RANKS
def test_without_a_mistake_nothing_is_noticed(ranks, num_ranks):
    assert not any(ranks.run(on_rank_mutant, "none", None))
