"""The files in configs/: they are valid, fit the nodes they name, and have the published sizes."""

from pathlib import Path

import parameter_cases
import pytest
import yaml

from megatron_ep.check import vocab_size, world_size
from megatron_ep.config import (
    ConfigError,
    check_world_size,
    dump_config,
    load_config,
    make_config,
)
from megatron_ep.config.build import ddp_config, optimizer_config, transformer_config
from megatron_ep.config.schema import TokenizerSection
from megatron_ep.parameters import count_parameters
from megatron_ep.ranks import embedding_ranks
from megatron_ep.tokenizer import make_tokenizer, model_vocab_size

CONFIGS = sorted(Path(__file__).resolve().parents[2].glob("configs/*.yaml"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)

# Parameters in total and per token, in billions: the reports and cards that the files name.
PUBLISHED = {
    "deepseek_v3": (671.0, 37.0),
    "mixtral_8x7b": (46.7, 12.9),
    "qwen3_235b_a22b": (235.0, 22.0),
    "qwen3_30b_a3b": (30.5, 3.3),
}


@every_config
def test_a_config_fits_the_nodes_it_names_and_says_so(path):
    config, ranks = load_config(path), world_size(load_config(path))
    assert config.launch.ranks_per_node is not None
    assert check_world_size(config, ranks) == []
    if path.stem != "quickstart":
        nodes = f"{config.launch.num_nodes} node"
        assert nodes in path.read_text().split("\n\n")[0]
    assert check_world_size(config, 2 * ranks + 1) != []


@every_config
def test_a_config_reads_back_to_the_same(path):
    config = load_config(path)
    assert make_config(yaml.safe_load(dump_config(config))) == config


@every_config
def test_megatron_core_accepts_a_config(path):
    config = load_config(path)
    core = transformer_config(config, use_te=config.model.transformer_impl == "transformer_engine")
    assert core.num_layers == config.model.num_layers
    assert core.num_moe_experts == config.moe.num_experts
    ddp_config(config)
    optimizer_config(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_the_published_size(name):
    config = load_config(next(path for path in CONFIGS if path.stem == name))
    count = count_parameters(config, vocab_size=vocab_size(config))
    total, active = PUBLISHED[name]
    assert count.total / 1e9 == pytest.approx(total, rel=0.03)
    assert count.active / 1e9 == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_stage_of_a_pipeline_has_layers(name):
    config = load_config(next(path for path in CONFIGS if path.stem == name))
    core = transformer_config(config, use_te=True)
    stages = core.pipeline_model_parallel_size
    chunks = core.virtual_pipeline_model_parallel_size or 1
    layout = core.pipeline_model_parallel_layout
    if layout is not None:
        assert len(layout.layout) == stages
        assert all(len(parts) == chunks for parts in layout.layout)
        return
    num_layers = core.num_layers
    num_layers += core.account_for_embedding_in_pipeline_split
    num_layers += core.account_for_loss_in_pipeline_split
    assert num_layers % (stages * chunks) == 0


def test_the_prediction_of_deepseek_v3_shares_the_embedding_of_the_first_stage():
    config = load_config(next(path for path in CONFIGS if path.stem == "deepseek_v3"))
    assert embedding_ranks(config, list(range(8))) == [0, 6]


@pytest.mark.parametrize("num_ranks", [1], ids=[""])
@pytest.mark.parametrize("name", parameter_cases.MODELS)
def test_a_count_agrees_with_the_model_that_is_built(ranks, num_ranks, name):
    ranks.run(parameter_cases.check_count, name)


def test_room_in_the_vocabulary_must_not_be_less_than_the_tokenizer_needs():
    tokenizer = make_tokenizer(TokenizerSection())
    assert model_vocab_size(TokenizerSection(), tokenizer) == 257
    assert model_vocab_size(TokenizerSection(vocab_size=300), tokenizer) == 300
    with pytest.raises(ConfigError, match="vocab_size = 256 is less than the 257"):
        model_vocab_size(TokenizerSection(vocab_size=256), tokenizer)
