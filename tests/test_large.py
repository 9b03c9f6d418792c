"""Offsets past 2**31 bytes are correct."""

import cases
import pytest
import torch
from backends import backends
from host_view import on_host

from ep_kernels.config import Layout

HIDDEN = 7168
NUM_TOKENS = 20_000  # on each of 2 ranks, rows of 57344 bytes: 2.3 GB arrive on one rank
CHUNK = 2_000


def marked_rows(rank):
    """[T, H] fp64, zero (and so without memory of its own) but for three elements of each row."""
    x = torch.zeros(NUM_TOKENS, HIDDEN, dtype=torch.float64)
    token = torch.arange(NUM_TOKENS, dtype=torch.float64)
    x[:, 0], x[:, HIDDEN // 2], x[:, -1] = token + 1, rank + 1, -token - 1
    return x


def check_marked_rows(rows, rank, scale=1):
    """`rows` are all rows of `rank`, in order."""
    assert rows.shape == (NUM_TOKENS, HIDDEN)
    for begin in range(0, NUM_TOKENS, CHUNK):
        chunk = rows[begin : begin + CHUNK]
        token = torch.arange(begin, begin + CHUNK, dtype=torch.float64)
        assert torch.equal(chunk[:, 0], scale * (token + 1))
        assert torch.equal(chunk[:, -1], scale * -(token + 1))
        assert (chunk[:, HIDDEN // 2] == scale * (rank + 1)).all()
        assert int(torch.count_nonzero(chunk)) == 3 * CHUNK


def on_rank_large(rank, backend, layout):
    """All tokens of both ranks go to expert 0; those of rank 1 straddle byte 2**31 of rank 0."""
    topk_idx = torch.zeros(NUM_TOKENS, 1, dtype=torch.int64)
    with cases.make_buffer(backend, num_experts=2, pool_bytes=6 << 30) as buffer:
        buffer = cases.device_results(buffer)
        result = buffer.dispatch(marked_rows(rank), topk_idx, layout=layout)
        assert len(result.recv_x) == (2 * NUM_TOKENS if rank == 0 else 0)
        assert rank == 1 or result.recv_x.nbytes > 2**31
        if rank == 0:
            check_marked_rows(on_host(result.recv_x[:NUM_TOKENS]), 0)
            check_marked_rows(on_host(result.recv_x[NUM_TOKENS:]), 1)
        combined = buffer.combine(result.recv_x, result.handle)
        del result
        check_marked_rows(on_host(combined.x), rank)


@pytest.mark.large
@backends("cpu", "cuda")
@pytest.mark.parametrize(
    "layout", [Layout.RANK_MAJOR, pytest.param(Layout.EXPERT_MAJOR, marks=pytest.mark.exhaustive)]
)
def test_offsets_past_two_gigabytes_are_correct(launch, backend, layout):
    launch(on_rank_large, backend, layout, num_ranks=2, deadline_s=120)
