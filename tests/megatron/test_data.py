"""Ranks read every sample once, and data that cannot be read is named."""

import pytest
import single_rank
import torch

from megatron_ep.data import BatchSampler
from megatron_ep.ranks import Ranks


def indices(data_rank, data_size, **sizes):
    """Micro batches of a rank."""
    ranks = Ranks(
        rank=data_rank,
        world_size=data_size,
        device=torch.device("cpu"),
        data_rank=data_rank,
        data_size=data_size,
    )
    defaults = {"num_samples": 26, "consumed_samples": 0, "micro_batch_size": 2}
    sampler = BatchSampler(**defaults | {"global_batch_size": 8} | sizes, ranks=ranks)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def test_micro_batches_alternate_between_ranks():
    assert indices(0, 2)[:4] == [[0, 1], [4, 5], [8, 9], [12, 13]]
    assert indices(1, 2)[:4] == [[2, 3], [6, 7], [10, 11], [14, 15]]


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_ranks_together_read_whole_global_batches_once(data_size):
    of_all = [indices(rank, data_size) for rank in range(data_size)]
    read = [i for batches in of_all for batch in batches for i in batch]
    assert sorted(read) == list(range(24))  # the last two samples are no global batch


def test_reading_goes_on_after_the_consumed_samples():
    assert indices(1, 2, consumed_samples=16) == indices(1, 2)[4:]
    assert indices(0, 2, consumed_samples=24) == []


def test_data_that_cannot_be_read_are_named(on_one_rank, corpus, tmp_path):
    broken = tmp_path / "broken"
    for suffix in (".bin", ".idx"):
        (tmp_path / f"broken{suffix}").touch()
    cases = [
        (["--data-path", tmp_path / "none"], f"data.data_path: no file {tmp_path}/none.bin"),
        (["--data-path", f"{corpus}.bin"], f"no file {corpus}.bin.bin (write '{corpus}')"),
        (["--data-path", "0.5", corpus, "0.5"], "data.data_path: expected weight, prefix, ..."),
        (["--data-path", "nan", corpus, "1", corpus], "data.data_path: weight nan is not a number"),
        (["--data-path", "0", corpus, "1", corpus], "data.data_path: weight 0 is not a number"),
        (["--data-path", broken], f"{broken}.idx is no index"),
        (["--split", "100,0,0"], "data.split = '100,0,0' leaves 0 validation samples"),
        (["--split", "0,100,0"], "data.split = '0,100,0' leaves no training data"),
        (["--tokenizer-type", "huggingface"], "'huggingface' needs tokenizer_model"),
        (["--device", "cuda"], "torch finds no CUDA device"),
        (
            ["--moe-experts", "torch", "--use-te-activation-func"],
            "a layer refuses these settings: use_te_activation_func=True is not possible",
        ),
        (["--moe-grouped-gemm"], "moe.moe_grouped_gemm: needs a GPU"),
        (["--load", tmp_path], f"checkpoint.load = '{tmp_path}': no checkpoint there"),
    ]
    if torch.cuda.is_available():
        cases = [case for case in cases if "GPU" not in case[1] and "CUDA" not in case[1]]
    flags = [flags for flags, _ in cases]
    results = on_one_rank(single_rank.try_to_train, corpus, tmp_path, flags)
    for (status, output), (_, message) in zip(results, cases):
        assert (status, output.count("error: ")) == (2, 1), output
        assert message in output


def test_two_data_sets_are_mixed_by_weight(on_one_rank, corpus, tmp_path):
    flags = ["--data-path", "0.25", corpus, "0.75", corpus, "--no-save-at-end"]
    ((status, output),) = on_one_rank(single_rank.try_to_train, corpus, tmp_path, [flags])
    assert status == 0, output
