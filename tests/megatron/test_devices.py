"""Which backend ranks choose, by the GPUs on which they are."""

import concurrent.futures
import types

import pytest
import torch
import torch.distributed as dist

from megatron_ep import devices


@pytest.mark.parametrize(
    ("uuids", "expected"),
    [("a", True), ("ab", True), ("aa", False), ("abca", False), ("abcd", True)],
)
def test_ranks_that_share_a_gpu_find_out(monkeypatch, uuids, expected):
    """Every rank sees one GPU, of index 0."""

    def ask(rank):
        device = types.SimpleNamespace(rank=rank)
        return devices._has_device_of_its_own(store, rank, len(uuids), device)

    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: types.SimpleNamespace(uuid=uuids[device.rank]),
    )
    store = dist.HashStore()
    with concurrent.futures.ThreadPoolExecutor(len(uuids)) as ranks:
        assert list(ranks.map(ask, range(len(uuids)))) == [expected] * len(uuids)


def test_a_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="'cuda', but torch finds no CUDA device"):
        devices.choose_device("cuda")


def test_gradients_are_reduced_one_by_one_and_not_meanwhile():
    with devices._one_by_one(None, async_ops=False) as handle:
        pass
    handle.wait()
    with pytest.raises(ValueError, match="overlap_grad_reduce"):
        devices._one_by_one(None, async_ops=True).__enter__()


def test_megatron_reduces_as_it_is_told(monkeypatch):
    from megatron.core.distributed import param_and_grad_buffer

    monkeypatch.setattr(param_and_grad_buffer, "_coalescing_manager", None)
    devices.reduce_gradients_one_by_one()
    assert param_and_grad_buffer._coalescing_manager is devices._one_by_one
