"""How many chunks a layer gets, from the times of its forward in one piece."""

import pytest

from megatron_ep.choose_chunks import MAX_CHUNKS, MIN_ROWS, Times, choose, estimate

MS = 1e-3


def make_times(*, dispatch=3.0, experts=10.0, combine=3.0, host=0.0, call=0.0):
    """In milliseconds."""
    return Times(
        dispatch=dispatch * MS,
        experts=experts * MS,
        combine=combine * MS,
        host=host * MS,
        call=call * MS,
    )


def test_the_estimate_is_that_of_the_worked_example():
    assert estimate(make_times(), 1) == pytest.approx((16 + 26) * MS)
    assert estimate(make_times(host=2), 4) == pytest.approx((11.5 + 21.5) * MS)
    assert estimate(make_times(host=10), 2) == pytest.approx((23 + 43) * MS)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (dict(), MAX_CHUNKS),
        (dict(host=2), MAX_CHUNKS),
        (dict(host=10), 1),  # launches take as long as the work
        (dict(dispatch=0.2, combine=0.2), 1),  # next to nothing to hide
        (dict(experts=0.2), 1),  # next to nothing to hide it behind
        (dict(dispatch=0.5, combine=0.5, experts=2, call=0.5), 1),  # calls are all latency
        (dict(dispatch=5, combine=5, experts=30, host=12), 2),
    ],
    ids=str,
)
def test_a_layer_is_cut_only_where_that_gains(times, expected):
    times = make_times(**times)
    assert choose(times, rows_per_expert=100 * MIN_ROWS) == expected
    best = estimate(times, expected)
    assert all(best <= estimate(times, n) * 1.06 for n in range(1, MAX_CHUNKS + 1))


@pytest.mark.parametrize(("rows", "most"), [(0, 1), (511, 1), (512, 2), (800, 3), (9999, 4)])
def test_every_expert_keeps_some_rows_in_a_chunk(rows, most):
    assert choose(make_times(), rows_per_expert=rows) == most
