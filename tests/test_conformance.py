"""dispatch is byte-exact and combine bit-exact against the specification, on every shape.

Every case does the whole round: get_dispatch_layout, dispatch, a second dispatch along the cached
routing, combine with bias and topk_weights (`cases.run_case`). The tests vary one thing at a time;
the last one varies everything at random.
"""

import random
from dataclasses import replace

import cases
import pytest
import torch
from backends import OVER_NODES, backends
from cases import Case

from ep_kernels.config import Layout
from ep_kernels.testing import ROUTING_KINDS

RANKS = pytest.mark.parametrize("num_ranks", [1, 2, 3, 4], ids="R{}".format)
LAYOUTS = pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name)
LIMITS = ("exact", "zero", "small", "large", "uneven", "inside padding")


@RANKS
@LAYOUTS
@pytest.mark.parametrize(
    "num_tokens",
    [
        (0,) * 8,
        (0, 9, 9, 9),
        (9, 0, 0, 0),
        (1,) * 8,
        (1, 0, 0, 0),
        cases.UNEQUAL,
        (129, 3, 257, 64),
    ],
    ids=["none", "none-on-0", "only-on-0", "one-each", "one", "unequal", "more"],
)
def test_any_number_of_tokens_on_each_rank(ranks, backend, num_ranks, layout, num_tokens):
    case = Case(
        num_ranks=num_ranks, num_tokens=num_tokens, layout=layout, num_experts=6 * num_ranks
    )
    ranks.run(cases.run_case, backend, case)


@RANKS
@LAYOUTS
@pytest.mark.parametrize("num_topk", [1, 2, 3, 5, "all"], ids="K={}".format)
@pytest.mark.parametrize("routing", ["uniform", "masked"])
def test_any_num_topk_up_to_all_experts(ranks, backend, num_ranks, layout, num_topk, routing):
    num_experts = 6 * num_ranks
    num_topk = num_experts if num_topk == "all" else num_topk
    case = Case(
        num_ranks=num_ranks,
        num_topk=num_topk,
        num_experts=num_experts,
        layout=layout,
        routing=routing,
    )
    ranks.run(cases.run_case, backend, case)


@LAYOUTS
def test_more_choices_than_a_warp_has_lanes(ranks, backend, layout):
    """GPUs list the rows of such a token in several rounds."""
    case = Case(num_topk=40, num_experts=48, layout=layout, hidden=264, num_biases=1)
    ranks.run(cases.run_case, backend, case)


@RANKS
@LAYOUTS
def test_one_expert_per_rank(ranks, backend, num_ranks, layout):
    case = Case(num_ranks=num_ranks, num_experts=num_ranks, num_topk=1, layout=layout)
    ranks.run(cases.run_cases, backend, [case, replace(case, num_topk=num_ranks)])


@RANKS
@LAYOUTS
@pytest.mark.parametrize("routing", list(ROUTING_KINDS))
def test_any_routing(ranks, backend, num_ranks, layout, routing):
    """empty: all entries are -1; one_expert: all tokens of all ranks go to expert 0."""
    case = Case(num_ranks=num_ranks, num_experts=12, num_topk=4, layout=layout, routing=routing)
    ranks.run(cases.run_case, backend, case)


@LAYOUTS
@pytest.mark.parametrize("dtype", list(cases.DTYPES))
@pytest.mark.parametrize("hidden", [16, 2880, 7168])
def test_any_dtype_and_hidden(ranks, backend, layout, dtype, hidden):
    case = Case(num_tokens=(11, 30), dtype=dtype, hidden=hidden, layout=layout, num_topk=4)
    ranks.run(cases.run_case, backend, case)


@LAYOUTS
@pytest.mark.parametrize(
    ("dtype", "hidden"), [("bf16", 8), ("fp16", 8), ("fp32", 4), ("fp64", 2), ("fp8", 16)]
)
@pytest.mark.parametrize("num_units", [1, 3, 5, 17, 33], ids="{}x16bytes".format)
def test_a_row_may_be_any_multiple_of_16_bytes(ranks, backend, layout, dtype, hidden, num_units):
    case = Case(dtype=dtype, hidden=hidden * num_units, layout=layout)
    ranks.run(cases.run_case, backend, case)


@RANKS
@pytest.mark.parametrize("expert_alignment", [1, 2, 7, 8, 128])
@pytest.mark.parametrize("routing", ["uniform", "zipf", "empty", "one_expert"])
def test_groups_start_at_multiples_of_the_alignment_and_padding_is_zero(
    ranks, backend, num_ranks, expert_alignment, routing
):
    case = Case(
        num_ranks=num_ranks,
        num_experts=12,
        layout=Layout.EXPERT_MAJOR,
        expert_alignment=expert_alignment,
        routing=routing,
        dtype="fp8",
    )
    ranks.run(cases.run_case, backend, case)


@RANKS
@LAYOUTS
@pytest.mark.parametrize("limit", LIMITS)
def test_capacity_fixes_the_rows_and_counts_what_it_drops(ranks, backend, num_ranks, layout, limit):
    case = Case(num_ranks=num_ranks, layout=layout, num_experts=12, num_topk=4, expert_alignment=8)
    if layout is Layout.RANK_MAJOR:
        case = replace(case, expert_alignment=1)
    case = replace(case, capacity=capacities(case, limit))
    ranks.run(cases.run_case, backend, case)


def capacities(case, limit):
    """Capacity of every rank. "inside padding" ends one row before the first group does."""
    unlimited = [cases.World(case, rank).rows[rank] for rank in range(case.num_ranks)]
    totals = [rows.num_rows for rows in unlimited]
    offsets = [rows.expert_offsets for rows in unlimited]
    if limit == "inside padding":
        ends = [n if o is None else o[:2][-1].item() for n, o in zip(totals, offsets)]
        return tuple(max(0, end - 1) for end in ends)
    return {
        "exact": tuple(totals),
        "zero": (0,) * case.num_ranks,
        "small": tuple(total // 2 for total in totals),
        "large": tuple(total + 13 for total in totals),
        "uneven": tuple(total // (rank + 1) + rank for rank, total in enumerate(totals)),
    }[limit]


@LAYOUTS
@pytest.mark.parametrize(
    "placement",
    [(0, 1, 2) * 4, (2, 1, 0, 0, 1, 2, 2, 2, 2), (2, 0, 0, 2, 2), (0, 0, 0, 0)],
    ids=["round-robin", "uneven", "none-on-1", "all-on-0"],
)
@pytest.mark.parametrize("num_ranks", [3])
def test_experts_may_live_anywhere(ranks, backend, num_ranks, layout, placement):
    case = Case(
        num_ranks=num_ranks,
        num_experts=len(placement),
        placement=placement,
        layout=layout,
        num_topk=4,
    )
    ranks.run(cases.run_case, backend, case)


@LAYOUTS
@pytest.mark.parametrize("weights", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_biases", [0, 1, 2])
def test_weights_and_biases_are_optional(ranks, backend, layout, weights, num_biases):
    case = Case(layout=layout, weights=weights, num_biases=num_biases, num_topk=4)
    ranks.run(cases.run_case, backend, case)


@LAYOUTS
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("num_biases", [0, 1, 2])
def test_biases_are_added_last_in_the_accumulation_type(ranks, backend, layout, dtype, num_biases):
    case = Case(layout=layout, dtype=dtype, num_biases=num_biases, num_topk=5, hidden=264)
    ranks.run(cases.run_case, backend, case)


@LAYOUTS
@pytest.mark.parametrize("num_sms", [1, 2, 4, 7])
def test_the_number_of_workers_changes_no_bit(ranks, backend, layout, num_sms):
    case = Case(layout=layout, num_sms=num_sms, num_tokens=(67, 3), num_topk=4, hidden=328)
    ranks.run(cases.run_case, backend, case)


@pytest.mark.parametrize("num_ranks", [6, 8])
@LAYOUTS
@pytest.mark.parametrize("routing", ["group_limited", "zipf", "masked"])
def test_many_ranks(ranks, backend, num_ranks, layout, routing):
    num_experts = 4 * num_ranks
    case = Case(
        num_ranks=num_ranks, num_experts=num_experts, num_topk=8, routing=routing, layout=layout
    )
    case = replace(case, expert_alignment=8 if layout is Layout.EXPERT_MAJOR else 1)
    ranks.run(cases.run_case, backend, case)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6], ids="R{}".format)
@backends("cpu", "nodes", "cuda")
def test_random_cases(ranks, backend, num_ranks, is_exhaustive):
    num_cases = (40 if backend in OVER_NODES else 100) * (10 if is_exhaustive else 1)
    seed = 99 + num_ranks
    batch = [random_case(random.Random(f"{seed} {i}"), num_ranks) for i in range(num_cases)]
    ranks.run(cases.run_cases, backend, batch, deadline_s=60.0 + 2.0 * num_cases)


def random_case(rng, num_ranks):
    num_experts = num_ranks * rng.choice([1, 2, 3, 8])
    placement = None
    if rng.random() < 0.4:
        placement = tuple(rng.randrange(num_ranks) for _ in range(num_experts))
    layout = rng.choice(list(Layout))
    case = Case(
        num_ranks=num_ranks,
        num_tokens=tuple(rng.choice([0, 1, 2, 7, 31, 64, 130]) for _ in range(num_ranks)),
        num_topk=rng.randint(1, min(num_experts, 9)),
        num_experts=num_experts,
        hidden=16 * rng.choice([1, 2, 3, 9, 40, 180]),
        dtype=rng.choice(list(cases.DTYPES)),
        routing=rng.choice(list(ROUTING_KINDS)),
        placement=placement,
        layout=layout,
        expert_alignment=rng.choice([1, 4, 16, 128]) if layout is Layout.EXPERT_MAJOR else 1,
        weights=rng.choice([None, torch.float32, torch.float64]),
        num_biases=rng.randint(0, 2),
        num_sms=rng.choice([None, 1, 2, 3, 4]),
        seed=rng.randrange(2**20),
    )
    if rng.random() < 0.4:
        case = replace(case, capacity=capacities(case, rng.choice(LIMITS)))
    return case
