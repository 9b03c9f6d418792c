"""Dispatch on GPUs to EXPERT_MAJOR rows of which each crosses a link once and is copied there.

Which peers get rows so follows from their GPUs; EP_KERNELS_SEND_ONCE=all makes it all of them, so
that ranks which share a GPU take the same way as those of several.
"""

import random
from dataclasses import replace

import cases
import pytest
from backends import backends
from test_conformance import random_case

from ep_kernels import env
from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError

VARIABLE = "EP_KERNELS_SEND_ONCE"


def run_sending_once(rank, backend, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "all")
        cases.run_cases(rank, backend, batch)


def by_expert(case):
    """The case with EXPERT_MAJOR rows and no capacity that was meant for others."""
    if case.layout is Layout.EXPERT_MAJOR:
        return case
    return replace(case, layout=Layout.EXPERT_MAJOR, capacity=None)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4], ids="R{}".format)
@backends("cuda")
def test_rows_that_are_sent_once_are_the_same_rows(ranks, backend, num_ranks):
    batch = [
        by_expert(random_case(random.Random(f"once {num_ranks} {i}"), num_ranks)) for i in range(40)
    ]
    ranks.run(run_sending_once, backend, batch, deadline_s=120.0)


@pytest.mark.parametrize("dtype", list(cases.DTYPES))
@backends("cuda")
def test_rows_of_many_pieces_and_of_more_choices_than_a_warp_has_lanes(ranks, backend, dtype):
    many = cases.Case(num_topk=40, num_experts=48, layout=Layout.EXPERT_MAJOR, dtype=dtype)
    large = replace(many, num_topk=8, hidden=7168, expert_alignment=16)
    ranks.run(run_sending_once, backend, [many, large])


def make_disagreeing_buffer(rank):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, ("all", "none")[rank])
        with pytest.raises(
            EPConfigError, match="ranks disagree on send_once: rank 0 has all, rank"
        ):
            cases.make_buffer("cpu", num_experts=2)


def test_ranks_that_disagree_on_it_say_so(ranks):
    ranks.run(make_disagreeing_buffer)


def test_other_values_are_refused(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert env.send_once() == "remote"
    monkeypatch.setenv(VARIABLE, "twice")
    with pytest.raises(EPConfigError, match="EP_KERNELS_SEND_ONCE='twice' is not"):
        env.send_once()
