"""A trained model continues a text; what is missing is said."""

import pytest
import single_rank
import torch
import training_runs as runs
from programs import Programs

from megatron_ep.config import ConfigError
from megatron_ep.generate import Sampling, choose

GREEDY = ["--temperature", 0, "--num-tokens", 30]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """Checkpoints of two ranks that know the words."""
    folder = tmp_path_factory.mktemp("generate")
    flags = ["--train-iters", 60, "--eval-interval", "none", "--hidden-dropout", 0]
    with Programs(folder / "programs") as programs:
        runs.check(runs.train(programs, corpus, folder / "run", *flags))
    return folder / "run"


def test_a_checkpoint_of_two_ranks_continues_a_text_on_one(programs, trained):
    done = programs.run(
        "megatron_ep.generate", "--load", trained, "--prompt", "each token", *GREEDY
    )
    assert done.returncode == 0, done.output
    assert done.output.startswith("each token ")
    assert len(done.output) == len("each token") + 30 + len("\n")


def test_sampling_is_repeatable_and_settings_may_change(on_one_rank, trained):
    prompt = ["--load", trained, "--prompt", "the ", "--num-tokens", 20]
    cases = [
        prompt,
        prompt,
        [*prompt, "--sample-seed", 1],
        [*prompt, "--moe-token-dispatcher-type", "alltoall"],
        [*prompt, "--top-k", 1],
        [*prompt, "--top-k", 1, "--sample-seed", 1],
        ["--load", trained, "--num-tokens", 3],
    ]
    results = on_one_rank(single_rank.generate_texts, cases)
    assert [status for status, _ in results] == [0] * len(cases)
    texts = [text for _, text in results]
    assert texts[0] == texts[1] == texts[3]
    assert texts[0] != texts[2]
    assert texts[4] == texts[5]
    assert all(text.startswith("the ") for text in texts[:-1])


def test_what_cannot_be_generated_is_said(on_one_rank, trained, tmp_path):
    cases = [
        (["--load", tmp_path], f"no checkpoint in {tmp_path}"),
        (["--load", tmp_path / "nowhere"], f"no checkpoint in {tmp_path}/nowhere"),
        (["--load", trained, "--ckpt-step", 3], f"no checkpoint of step 3 in {trained}"),
        (["--load", trained, "--hidden-size", 64], "does not fit this model"),
        (["--load", trained, "--num-layer", 3], "--num-layer: unknown flag; did you mean"),
        (["--load", trained, "--top-p", 0], "top_p=0.0 must be more than 0"),
        (["--load", trained, "--temperature", -1], "temperature=-1.0 must be at least 0"),
    ]
    flags = [flags for flags, _ in cases]
    results = on_one_rank(single_rank.generate_texts, flags)
    for (status, output), (_, message) in zip(results, cases):
        assert status == 2
        assert f"error: {message}" in output.replace(f"{trained}/iter_0000060 ", "")


def test_prediction_of_further_tokens_and_a_layout_are_left_to_training(
    train_on_ranks, on_one_rank, tmp_path
):
    flags = ["--pipeline-model-parallel-size", 2, "--pipeline-model-parallel-layout", "Et|tmL"]
    flags += ["--expert-model-parallel-size", 1, "--mtp-num-layers", 1, "--eval-interval", "none"]
    ((status, printed),) = train_on_ranks(2, {"run": [*flags, "--global-batch-size", 8]}).values()
    assert status == 0, printed
    prompt = ["--load", tmp_path / "run", "--prompt", "the ", "--num-tokens", 3]
    ((status, printed),) = on_one_rank(single_rank.generate_texts, [prompt])
    assert status == 0, printed
    assert printed.startswith("the ")


LOGITS = torch.tensor([1.0, 3.0, 2.0, -50.0])


def choices(**sampling):
    generator = torch.Generator().manual_seed(0)
    return {choose(LOGITS, Sampling(**sampling), generator) for _ in range(200)}


def test_tokens_are_chosen_among_the_likeliest():
    assert choices(temperature=0) == {1}
    assert choices(top_k=1) == {1}
    assert choices(top_k=2, top_p=1.0) == {1, 2}
    assert choices(top_p=0.5) == {1}
    assert choices(top_p=1.0) == {0, 1, 2}


@pytest.mark.parametrize("value", [{"num_tokens": -1}, {"top_k": -1}, {"top_p": 1.5}])
def test_a_setting_out_of_range_is_named(value):
    ((name, number),) = value.items()
    with pytest.raises(ConfigError, match=f"{name}={number}"):
        Sampling(**value)
