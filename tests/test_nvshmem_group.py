"""Chunks by NVSHMEM without a GPU: which rings a buffer takes, and when it gives them back.

On a GPU the other suites run over it:

    EP_KERNELS_SCALEOUT=nvshmem scripts/with_mps.sh pytest --backend cuda_nodes tests/test_nodes.py
"""

import os
import threading
from unittest import mock

import pytest
import torch

from ep_kernels import env, nvshmem_group, nvshmem_ll, nvshmem_world
from ep_kernels.bootstrap import make_bootstrap
from ep_kernels.errors import EPConfigError, EPDeviceError, EPTimeoutError
from ep_kernels.nvshmem_group import KeptRings, NvshmemGroup, take_rings


def on_rank_takes(rank):
    """Names of rings that each rank has kept, in turn."""
    bootstrap = make_bootstrap(None)
    made = iter(("first", "second", "third"))

    def take():
        return take_rings(bootstrap, lambda rings: rings != "small", lambda: next(made))

    kept = nvshmem_group._kept
    one = take()
    assert one.rings == "first"
    kept[one.name] = one
    kept[f"of rank {rank} alone"] = KeptRings("", "other")
    assert take() == one
    assert one.name not in kept
    if rank == 0:  # the other rank's have failed
        kept[one.name] = one
    assert take().rings == "second"
    kept["small"] = KeptRings("small", "small")
    assert take().rings == "third"
    kept.clear()


def test_a_buffer_takes_rings_that_all_ranks_have_kept(ranks):
    ranks.run(on_rank_takes)


class Work:
    """An exchange: its own event, and the moment behind it."""

    def __init__(self, is_over):
        self.event, self.is_over = self, is_over

    def query(self):
        return self.is_over


class Rings:
    def __init__(self, error=None):
        self.error = error

    def check(self):
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("last", "error", "is_usable"),
    [
        (None, None, True),
        (Work(True), None, True),
        (Work(False), None, False),
        (Work(True), EPTimeoutError("rank 1"), False),
        (Work(True), EPDeviceError("broken"), False),
    ],
)
def test_rings_are_kept_if_nothing_is_wrong_with_them(last, error, is_usable):
    answers = []
    group = NvshmemGroup(Rings(error), None, None, answers.append)
    group._last = last
    group.abort()
    group.abort()
    assert answers == [is_usable]


def test_an_exchange_that_was_given_up_names_the_rank():
    group = NvshmemGroup(Rings(EPTimeoutError("rank 1", peer=1)), None, None, print)
    assert not group.is_over(Work(False))
    with pytest.raises(EPTimeoutError) as raised:
        group.is_over(Work(True))
    assert raised.value.peer == 1


@mock.patch.dict(os.environ)
def test_a_heap_that_would_have_to_grow_is_refused_where_ranks_share_a_gpu():
    for name in ("NVSHMEM_CUMEM_GRANULARITY", "NVSHMEM_DISABLE_CUDA_VMM"):
        os.environ.pop(name, None)
    assert nvshmem_ll._growth_problem(1 << 40, shares_gpu=True) is None, "nothing is known"
    env.set_nvshmem_defaults(300 << 20)
    assert env.nvshmem_chunk_bytes() == 512 << 20
    assert nvshmem_ll._growth_problem(300 << 20, shares_gpu=True) is None
    assert nvshmem_ll._growth_problem(600 << 20, shares_gpu=False) is None
    problem = nvshmem_ll._growth_problem(600 << 20, shares_gpu=True)
    assert isinstance(problem, EPDeviceError)
    assert f"need {600 << 20} bytes" in str(problem)
    os.environ["NVSHMEM_DISABLE_CUDA_VMM"] = "1"
    assert nvshmem_ll._growth_problem(600 << 20, shares_gpu=True) is None


@pytest.mark.parametrize(("text", "is_known"), [("", True), ("node", True), ("near", False)])
def test_who_is_stored_to_has_three_names(monkeypatch, text, is_known):
    monkeypatch.setenv("EP_KERNELS_NVSHMEM_DIRECT", text)
    if is_known:
        assert env.nvshmem_direct() == (text or "all")
    else:
        with pytest.raises(EPConfigError, match="DIRECT='near' is not all, node or none"):
            env.nvshmem_direct()


def test_nvshmem_is_not_used_any_more_once_a_collective_step_was_late(monkeypatch):
    is_over = threading.Event()
    monkeypatch.setattr(nvshmem_world, "_stuck", "")
    monkeypatch.setattr(nvshmem_world, "_joined", ["this process"])
    monkeypatch.setattr(nvshmem_world, "why_not", lambda: "")
    monkeypatch.setattr(nvshmem_world, "call", lambda function: is_over.wait(30))
    assert nvshmem_world.is_usable()
    problem = nvshmem_world.attempt(0.05, "make a lane", "any", library=mock.Mock())
    is_over.set()
    assert isinstance(problem, EPTimeoutError)
    assert not nvshmem_world.is_usable()
    refused = nvshmem_world._problem(torch.device("cuda"), ["this process"])
    assert isinstance(refused, EPDeviceError)
    assert "waited 0.05 s for the other ranks to make a lane" in str(refused)


def test_open_buffers_end_before_nvshmem_does(monkeypatch):
    steps = []
    monkeypatch.setattr(nvshmem_world, "leave", lambda timeout_s: steps.append("NVSHMEM"))
    monkeypatch.setattr("ep_kernels.buffer.destroy_open_buffers", lambda: steps.append("buffers"))
    nvshmem_world._leave_at_exit()
    assert steps == ["buffers", "NVSHMEM"]


class WithoutMemory:
    """A bootstrap whose other rank has no memory."""

    def all_gather(self, own):
        return [own, (EPDeviceError("out of memory"), {})]


def test_memory_of_a_buffer_that_cannot_be_made_is_for_the_next_one(monkeypatch):
    monkeypatch.setattr(nvshmem_ll, "_unused", {})
    memory = nvshmem_ll.LlMemory("one", 0, 0, 0)
    with pytest.raises(EPDeviceError, match="rank 1"), nvshmem_ll._unused_on_error(memory):
        nvshmem_world.agree(WithoutMemory(), None, {})
    assert nvshmem_ll._unused == {"one": memory}
