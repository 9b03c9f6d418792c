"""A pipeline of stages trains like a model in one piece, wherever its layers are."""

import json

import pytest
import training_runs as runs

from megatron_ep.config import ConfigError, make_config
from megatron_ep.preprocess import write_dataset
from megatron_ep.ranks import embedding_ranks
from megatron_ep.tokenizer import ByteTokenizer

ONE_PIECE = [
    *("--expert-model-parallel-size", 1, "--global-batch-size", 8, "--mtp-num-layers", 1),
    *("--num-layers", 3, "--moe-layer-freq", 0, 1, 1, "--hidden-dropout", 0),
    *("--eval-interval", "none", "--clip-grad", 0.1),
]
UNTIED = ["--untie-embeddings-and-output-weights"]

PIPELINES = {
    "prediction alone": [
        *("--pipeline-model-parallel-size", 4, *UNTIED),
        *("--pipeline-model-parallel-layout", "Et|tt|m|L"),
    ],
    "interleaved": [
        *("--pipeline-model-parallel-size", 4, "--virtual-pipeline-model-parallel-size", 2),
        *("--pipeline-model-parallel-layout", "E|t||t|t||m|L", *UNTIED),
    ],
    "prediction with the tied output": [
        *("--pipeline-model-parallel-size", 2),
        *("--pipeline-model-parallel-layout", "Ett|tmL"),
    ],
}


def assert_alike(output, judge):
    """Two runs made the same steps, up to rounding, from the same weights."""
    steps, expected = runs.records(output, "train"), runs.records(judge, "train")
    assert len(steps) == len(expected) > 0
    assert steps[0]["tokens_per_expert"] == expected[0]["tokens_per_expert"]
    for name in ("loss", "grad_norm", "load_balancing_loss"):
        values = [step[name] for step in steps]
        assert values == pytest.approx([step[name] for step in expected], rel=1e-4)


def test_multi_token_prediction_trains_alike_in_every_layout(train_on_ranks, tmp_path):
    cases, judges = {}, {}
    for name, tie in (("untied", UNTIED), ("tied", [])):
        cases[name] = [*ONE_PIECE, *tie, "--train-iters", 2]
        again = [*ONE_PIECE, "--load", tmp_path / name, "--finetune", "--train-iters", 3]
        cases[f"{name}, in one piece"] = again + tie
        for pipeline, flags in PIPELINES.items():
            if (UNTIED[0] in flags) == bool(tie):
                cases[pipeline], judges[pipeline] = again + flags, f"{name}, in one piece"
    for status, printed in train_on_ranks(4, cases).values():
        assert status == 0, printed
    for name, judge in judges.items():
        assert_alike(tmp_path / name, tmp_path / judge)


@pytest.fixture
def short_documents(tmp_path, megatron_here):
    """Prefix of a data set with several documents in each sequence."""
    source = tmp_path / "short.jsonl"
    words = (f"{i * 7919 % 1000}" for i in range(3000))
    source.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    write_dataset([source], tmp_path / "short", ByteTokenizer())
    return tmp_path / "short"


def test_every_stage_hides_earlier_documents(train_on_ranks, short_documents, tmp_path):
    start = [*ONE_PIECE, "--mtp-num-layers", "none", "--data-path", short_documents]
    start += ["--num-layers", 4, "--moe-layer-freq", 1, "--train-iters", 2]
    again = [*start, "--load", tmp_path / "start", "--finetune", "--reset-attention-mask"]
    cases = {
        "start": start,
        "seen": [*again, "--no-reset-attention-mask"],
        "in one piece": again,
        "in a pipeline": [*again, "--pipeline-model-parallel-size", 4],
    }
    for status, printed in train_on_ranks(4, cases).values():
        assert status == 0, printed
    assert_alike(tmp_path / "in a pipeline", tmp_path / "in one piece")
    assert runs.losses(tmp_path / "seen")[0] != pytest.approx(
        runs.losses(tmp_path / "in one piece")[0], rel=1e-3
    )


PREDICTS = {"mtp_num_layers": 1}


def layout(text, **parallelism):
    sizes = {"pipeline_model_parallel_size": 4, **parallelism}
    named = {**PREDICTS, "num_layers": 2, "pipeline_model_parallel_layout": text}
    return {"model": named, "parallelism": sizes}


@pytest.mark.usefixtures("megatron_here")
@pytest.mark.parametrize(
    ("values", "is_tied", "expected"),
    [
        ({"model": {}}, False, [10]),
        ({"model": {}}, True, [10, 13]),
        ({"model": PREDICTS}, False, [10, 13]),
        (layout("Et|t|m|L"), False, [10, 12]),
        (layout("Et|t|m|L"), True, [10, 12, 13]),
        (layout("Et|t||mL"), False, [10, 13]),
        (layout("E|t||t||m||L", virtual_pipeline_model_parallel_size=2), False, [10, 11]),
    ],
)
def test_every_stage_that_embeds_tokens_takes_part_in_the_sum_of_gradients(
    values, is_tied, expected
):
    model = {**values["model"], "untie_embeddings_and_output_weights": not is_tied}
    config = make_config({**values, "model": model})
    assert embedding_ranks(config, [10, 11, 12, 13]) == expected


@pytest.mark.usefixtures("megatron_here")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (layout("Et|t|x|L"), r"layout = 'Et\|t\|x\|L': Invalid layer character: x"),
        (layout("Et|t|L"), r"layout = 'Et\|t\|L': .*must be divisible by .*size"),
        (layout("Et|tt|m|L"), r"layout = 'Et\|tt\|m\|L': Number of decoder layers 3"),
        (layout("Et|t||L"), r"layout = 'Et\|t\|\|L': Number of mtp layers"),
        (
            layout(
                "Et|t|m|L", pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
            ),
            r"layout = 'Et\|t\|m\|L': layers of multi-token prediction .* first stage",
        ),
        (layout("E|t||t||m||L"), "has 2 chunks for each of 4 stages, .*size = None"),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        make_config(values)
