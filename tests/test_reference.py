"""The specification itself: against numbers worked out by hand, and against loops over tokens."""

import doctest

import pytest
import torch

from ep_kernels import reference, testing
from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError
from ep_kernels.reference import spec
from ep_kernels.testing import ROUTING_KINDS, assert_bitwise_equal, make_routing

LAYOUTS = pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name)


def test_the_examples_in_the_docstrings_are_true():
    batch = {}
    for example in doctest.DocTestParser().get_examples(spec.__doc__):
        exec(example.source, vars(spec), batch)
    assert set(batch) == {"placement", "topk_idxs", "xs"}
    for module in (spec, testing.routing, testing.assertions, testing.leaks):
        results = doctest.testmod(module, extraglobs=batch)
        assert results.failed == 0
        assert results.attempted > 0


# Three ranks, six experts dealt round robin: rank 0 has 0 and 3, rank 1 has 1 and 4, rank 2 has 2
# and 5. Rank 1 has no tokens.
PLACEMENT = reference.make_placement(6, 3, torch.tensor([0, 1, 2, 0, 1, 2]))
TOPK_IDXS = [
    torch.tensor([[3, 0, 5], [-1, -1, -1], [4, -1, 3]]),
    torch.zeros(0, 3, dtype=torch.int64),
    torch.tensor([[-1, 0, 1]]),
]
TOPK_WEIGHTS = [
    torch.tensor([[0.5, 0.25, 0.125], [9.0, 9.0, 9.0], [0.75, 9.0, 1.5]]),
    torch.zeros(0, 3),
    torch.tensor([[9.0, 2.0, 4.0]]),
]
XS = [torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(0, 1), torch.tensor([[4.0]])]


def dispatch_by_hand_example(rank, **options):
    return reference.dispatch(
        XS, TOPK_IDXS, TOPK_WEIGHTS, placement=PLACEMENT, rank=rank, **options
    )


def test_layout_counts_a_token_once_per_rank_and_once_per_expert():
    layout = reference.get_dispatch_layout(TOPK_IDXS[0], PLACEMENT)
    assert layout.num_tokens_per_rank.tolist() == [2, 1, 1]
    assert layout.num_tokens_per_expert.tolist() == [1, 0, 0, 2, 1, 1]
    assert layout.is_token_in_rank.tolist() == [
        [True, False, True],
        [False, False, False],
        [True, True, False],
    ]
    assert layout.num_tokens_per_rank.dtype == layout.num_tokens_per_expert.dtype == torch.int32


def test_rank_major_rows_are_ordered_by_source_rank_then_token():
    result = dispatch_by_hand_example(rank=0)
    assert result.recv_x.tolist() == [[1.0], [3.0], [4.0]]
    assert result.recv_topk_idx.tolist() == [[1, 0, -1], [-1, -1, 1], [-1, 0, -1]]
    assert result.recv_topk_weights.tolist() == [[0.5, 0.25, 0], [0, 0, 1.5], [0, 2, 0]]
    assert result.num_recv_tokens_per_expert.tolist() == [2, 2]
    assert result.expert_offsets is None
    assert result.num_overflow.tolist() == [0]


def test_expert_major_rows_are_grouped_by_expert_and_groups_are_aligned():
    result = dispatch_by_hand_example(rank=0, layout=Layout.EXPERT_MAJOR, expert_alignment=3)
    assert result.recv_x.tolist() == [[1.0], [4.0], [0.0], [1.0], [3.0], [0.0]]
    assert result.recv_topk_weights.tolist() == [0.25, 2.0, 0.0, 0.5, 1.5, 0.0]
    assert result.recv_topk_idx is None
    assert result.num_recv_tokens_per_expert.tolist() == [2, 2]
    assert result.expert_offsets.tolist() == [0, 3, 6]


def test_capacity_cuts_the_rows_and_not_the_counts():
    result = dispatch_by_hand_example(
        rank=0, layout=Layout.EXPERT_MAJOR, expert_alignment=3, capacity=4
    )
    assert result.recv_x.tolist() == [[1.0], [4.0], [0.0], [1.0]]
    assert result.num_recv_tokens_per_expert.tolist() == [2, 2]
    assert result.expert_offsets.tolist() == [0, 3, 6]
    assert result.num_overflow.tolist() == [1]  # padding that is cut off is not an overflow
    result = dispatch_by_hand_example(rank=0, capacity=2)
    assert result.recv_topk_idx.tolist() == [[1, 0, -1], [-1, -1, 1]]
    assert result.num_recv_tokens_per_expert.tolist() == [2, 2]
    assert result.num_overflow.tolist() == [1]


def test_capacity_beyond_the_rows_leaves_rows_without_choices():
    result = dispatch_by_hand_example(rank=1, capacity=4)
    assert result.recv_x.shape == (4, 1)
    assert result.recv_x[:2].tolist() == [[3.0], [4.0]]
    assert result.recv_topk_idx.tolist() == [[1, -1, -1], [-1, -1, 0], [-1] * 3, [-1] * 3]
    assert result.num_overflow.tolist() == [0]
    assert result.handle.num_rows == 2


@LAYOUTS
def test_combine_adds_in_the_order_of_the_layout(layout):
    """Token 0 of rank 0 chose experts 3 and 0 (both rank 0) and 5 (rank 2)."""
    rows = [reference.recv_rows(TOPK_IDXS, PLACEMENT, r, layout=layout) for r in range(3)]
    xs = [torch.zeros(len(part.src_rank), 1) for part in rows]
    big = 2.0**24  # the next fp32 number is big + 2: adding 1 twice is lost, adding 2 is not
    if layout is Layout.EXPERT_MAJOR:
        xs[0][2], xs[0][0], xs[2][0] = big, 1.0, 1.0  # k = 0 (expert 3), 1 (expert 0), 2 (expert 5)
        expected = big
        xs_reordered = [xs[0].clone(), xs[1], xs[2].clone()]
        xs_reordered[0][2], xs_reordered[2][0] = 1.0, big
        expected_reordered = big + 2
    else:
        xs[0][0], xs[2][0] = big, 1.0  # one row per rank
        expected = big
        xs_reordered = [xs[0] - xs[0] + 1.0, xs[1], xs[2] - xs[2] + 3.0]
        expected_reordered = 4.0
    for values, want in ((xs, expected), (xs_reordered, expected_reordered)):
        result = reference.combine(values, rows, TOPK_IDXS[0], placement=PLACEMENT, rank=0)
        assert result.x[0].item() == want
        assert result.x[1].item() == 0.0  # no rows


def test_combine_sums_in_fp32_and_rounds_once_to_nearest_even():
    rows = [
        reference.recv_rows(TOPK_IDXS, PLACEMENT, r, layout=Layout.EXPERT_MAJOR) for r in (0, 1)
    ]
    rows.append(reference.recv_rows(TOPK_IDXS, PLACEMENT, 2, layout=Layout.EXPERT_MAJOR))
    xs = [torch.zeros(len(part.src_rank), 1, dtype=torch.bfloat16) for part in rows]
    xs[0][2], xs[0][0], xs[2][0] = 1.0, 2.0**-9, 2.0**-8  # bf16 steps at 1: 2**-7
    result = reference.combine(xs, rows, TOPK_IDXS[0], placement=PLACEMENT, rank=0)
    assert result.x[0].item() == 1.0 + 2.0**-7  # rounding after every addition would give 1
    xs[0][0] = 0.0
    result = reference.combine(xs, rows, TOPK_IDXS[0], placement=PLACEMENT, rank=0)
    assert result.x[0].item() == 1.0  # a tie goes to the even neighbour


def test_combine_starts_from_positive_zero():
    rows = [reference.recv_rows(TOPK_IDXS, PLACEMENT, rank) for rank in range(3)]
    xs = [torch.full((len(part.src_rank), 1), -0.0) for part in rows]
    bias = torch.full((3, 1), -0.0)
    result = reference.combine(xs, rows, TOPK_IDXS[0], placement=PLACEMENT, rank=0, bias=bias)
    assert_bitwise_equal(result.x, torch.zeros(3, 1))


def test_bias_pair_is_added_after_the_rows_in_order():
    rows = [reference.recv_rows(TOPK_IDXS, PLACEMENT, rank) for rank in range(3)]
    xs = [torch.full((len(part.src_rank), 1), 1.0) for part in rows]
    big = torch.full((3, 1), 2.0**24)
    result = reference.combine(
        xs, rows, TOPK_IDXS[0], placement=PLACEMENT, rank=0, bias=(big, -big)
    )
    assert result.x.flatten().tolist() == [2.0, 0.0, 2.0]
    one = torch.ones(3, 1)
    result = reference.combine(xs, rows, TOPK_IDXS[0], placement=PLACEMENT, rank=0, bias=(big, one))
    assert result.x[1].item() == 2.0**24  # 0 + 2**24 + 1, rounded to even


@LAYOUTS
def test_combine_returns_to_each_choice_the_weight_of_its_row(layout):
    rows = [reference.recv_rows(TOPK_IDXS, PLACEMENT, r, layout=layout) for r in range(3)]
    results = [dispatch_by_hand_example(rank, layout=layout) for rank in range(3)]
    xs = [result.recv_x for result in results]
    weights = [result.recv_topk_weights for result in results]
    for rank in range(3):
        back = reference.combine(
            xs, rows, TOPK_IDXS[rank], placement=PLACEMENT, rank=rank, topk_weights=weights
        )
        assert_bitwise_equal(
            back.topk_weights, TOPK_WEIGHTS[rank].masked_fill(TOPK_IDXS[rank] < 0, 0.0)
        )


# The same definitions as loops over tokens, sharing nothing with the specification.


def rows_by_loops(topk_idxs, rank_of, rank, layout, alignment):
    """List of (source rank, token, k) or None for padding; k is None in the rank-major layout."""
    rows = []
    if layout is Layout.RANK_MAJOR:
        for src, topk_idx in enumerate(topk_idxs):
            for token, choices in enumerate(topk_idx.tolist()):
                if any(e >= 0 and rank_of[e] == rank for e in choices):
                    rows.append((src, token, None))
        return rows
    for expert in [e for e, owner in enumerate(rank_of) if owner == rank]:
        for src, topk_idx in enumerate(topk_idxs):
            for token, choices in enumerate(topk_idx.tolist()):
                rows += [(src, token, k) for k, e in enumerate(choices) if e == expert]
        while len(rows) % alignment:
            rows.append(None)
    return rows


def combine_by_loops(xs, rows, rank_of, topk_idx, rank):
    """float64 [T, H] for one rank: integers small enough that no order matters."""
    out = torch.zeros(len(topk_idx), xs[0].shape[1], dtype=torch.float64)
    for x, part in zip(xs, rows):
        for row, source in enumerate(part):
            if source is not None and source[0] == rank:
                out[source[1]] += x[row]
    return out


@LAYOUTS
@pytest.mark.parametrize("kind", list(ROUTING_KINDS))
@pytest.mark.parametrize(
    ("rank_of", "num_topk"),
    [([0, 0, 0, 0], 4), ([0, 0, 1, 1, 2, 2], 3), ([2, 0, 2, 2, 0, 2, 2, 0], 2)],
    ids=["one-rank", "linear", "rank-1-has-none"],
)
def test_the_specification_equals_loops_over_tokens(layout, kind, rank_of, num_topk):
    num_ranks, alignment = max(rank_of) + 1, 4 if layout is Layout.EXPERT_MAJOR else 1
    placement = reference.make_placement(len(rank_of), num_ranks, torch.tensor(rank_of))
    topk_idxs, topk_weights = zip(
        *(make_routing(kind, n, num_topk, len(rank_of), seed=n) for n in (7, 0, 12)[:num_ranks])
    )
    xs = [torch.randint(-99, 99, (len(idx), 3)).double() for idx in topk_idxs]
    by_loops = [rows_by_loops(topk_idxs, rank_of, r, layout, alignment) for r in range(num_ranks)]
    results = [
        reference.dispatch(
            xs,
            topk_idxs,
            topk_weights,
            placement=placement,
            rank=rank,
            layout=layout,
            expert_alignment=alignment,
        )
        for rank in range(num_ranks)
    ]
    for result, rows in zip(results, by_loops):
        want = [torch.zeros(3) if row is None else xs[row[0]][row[1]] for row in rows]
        assert result.recv_x.tolist() == [row.tolist() for row in want]
        for row, weights in zip(rows, result.recv_topk_weights.tolist()):
            if layout is Layout.EXPERT_MAJOR:
                assert weights == (0 if row is None else topk_weights[row[0]][row[1], row[2]])
    ys = [torch.randint(-99, 99, (len(rows), 3)).double() for rows in by_loops]
    for rank in range(num_ranks):
        back = reference.combine(
            ys, [r.handle for r in results], topk_idxs[rank], placement=placement, rank=rank
        )
        assert_bitwise_equal(back.x, combine_by_loops(ys, by_loops, rank_of, topk_idxs[rank], rank))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 2), "num_experts=5 is not divisible by num_ranks=2"),
        ((0, 2), "num_experts=0 is not positive"),
        ((2, 2, torch.tensor([0, 2])), r"expert_to_rank\[1\]=2 is outside \[0, num_ranks=2\)"),
        (
            (2, 2, torch.tensor([0])),
            r"expert_to_rank: torch.int64 \[1\], expected .* \[num_experts=2",
        ),
        ((2, 2, torch.tensor([0.0, 1.0])), "expert_to_rank: torch.float32"),
    ],
)
def test_impossible_placements_are_refused(arguments, message):
    with pytest.raises(EPConfigError, match=message):
        reference.make_placement(*arguments)


def test_fp8_rows_and_scales_travel_together():
    x = torch.arange(48, dtype=torch.float32).reshape(3, 16).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0], [2.0], [3.0]])
    topk_idx = torch.tensor([[1], [0], [1]])
    for rank, tokens in enumerate([[1], [0, 2]]):
        result = reference.dispatch(
            [(x, scales), (x[:0], scales[:0])],
            [topk_idx, topk_idx[:0]],
            placement=reference.make_placement(2, 2),
            rank=rank,
        )
        assert_bitwise_equal(result.recv_x.view(torch.uint8), x.view(torch.uint8)[tokens])
        assert_bitwise_equal(result.recv_scales, scales[tokens])
