"""Configuration files and flags: what is read, what wins, and what is refused."""

import pytest

from megatron_ep.config import ConfigError, config_from_arguments, load_config

pytestmark = pytest.mark.usefixtures("megatron_here")

FILE = """
model:
  num_layers: 2
  recompute_granularity: full
moe:
  num_experts: 4
  moe_router_topk: 1
optimizer:
  lr: 1e-3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    return path


def parse(*flags):
    return config_from_arguments(flags, program="pretrain")


def test_a_file_without_flags_is_taken_as_it_is(file):
    config = parse("--config", str(file))
    assert config == load_config(file)
    assert (config.model.num_layers, config.moe.num_experts, config.optimizer.lr) == (2, 4, 1e-3)


@pytest.mark.parametrize(
    ("flags", "section", "key", "value"),
    [
        ("--num-layers 6", "model", "num_layers", 6),
        ("--num-layers=6", "model", "num_layers", 6),
        ("--moe-router-topk 2", "moe", "moe_router_topk", 2),
        ("--num-experts 8", "moe", "num_experts", 8),
        ("--num-experts none", "moe", "num_experts", None),
        ("--lr 3e-4", "optimizer", "lr", 3e-4),
        ("--bf16", "model", "precision", "bf16"),
        ("--swiglu", "model", "activation", "swiglu"),
        ("--disable-bias-linear", "model", "add_bias_linear", False),
        ("--norm-epsilon 1e-6", "model", "layernorm_epsilon", 1e-6),
        ("--position-embedding-type none", "model", "position_embedding_type", "none"),
        (
            "--moe-router-load-balancing-type none",
            "moe",
            "moe_router_load_balancing_type",
            "none",
        ),
        ("--moe-layer-freq 0 1", "moe", "moe_layer_freq", [0, 1]),
        ("--moe-layer-freq 2", "moe", "moe_layer_freq", 2),
        ("--use-distributed-optimizer", "parallelism", "use_distributed_optimizer", True),
        ("--no-sequence-parallel", "parallelism", "sequence_parallel", False),
        ("--moe-z-loss-coeff none", "moe", "moe_z_loss_coeff", None),
        ("--data-path 0.3 a 0.7 b", "data", "data_path", ["0.3", "a", "0.7", "b"]),
        ("--data-path a", "data", "data_path", ["a"]),
        ("--save out", "checkpoint", "save", "out"),
        ("--ep-num-sms 3", "ep", "num_sms", 3),
    ],
)
def test_a_flag_in_megatrons_spelling_overrides_the_file(file, flags, section, key, value):
    config = parse("--config", str(file), *flags.split())
    assert getattr(getattr(config, section), key) == value
    if section != "optimizer":
        assert config.optimizer.lr == 1e-3  # the rest stays as the file says


def test_a_flag_of_a_field_of_megatron_overrides_the_file_wherever_it_stands(file):
    file.write_text("transformer: {window_size: [1, 0]}\n" + FILE)
    flags = ["--recompute-granularity", "selective", "--window-size", "2", "0"]
    config = parse("--config", str(file), *flags)
    assert config.transformer == {"recompute_granularity": "selective", "window_size": (2, 0)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--moe-router-topkk 2",
            "--moe-router-topkk: unknown flag; did you mean '--moe-router-topk",
        ),
        ("--num-layer=2", "--num-layer=2: unknown flag; did you mean '--num-layers'?"),
        ("--num-layers", "--num-layers: expected one argument"),
        ("--sequence-parallel=3", "--sequence-parallel"),
        ("leftover --num-layers 2", "leftover: not expected here"),
        ("--num-layers two", "model.num_layers: .*got 'two'"),
        ("--lr -1", "optimizer.lr: .*got '-1'"),
        (
            "--moe-token-dispatcher-type mail",
            "moe.moe_token_dispatcher_type: .*'deepep'.*got 'mail'",
        ),
        ("--num-experts 4 --moe-router-topk 5", "moe_router_topk = 5 is more than num_experts = 4"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(*flags.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "not YAML: .*line 1"),
        (b"- model\n- moe\n", "expected sections, got list"),
        (b"model: 3\n", "model: expected keys and values, got 3"),
        (b"model: {num_layers: 2}\nmoe: {}\nmodel: {}\n", "'model' stands twice.*\n.*line 3"),
        (b"model:\n  num_layers: 2\n  num_layers: 3\n", "'num_layers' stands twice.*\n.*line 3"),
        (b"model: {}  # caf\xe9\n", "not UTF-8 at byte 16"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    for flags in ([], ["--num-layers", "2"]):
        with pytest.raises(ConfigError, match=f"(?s)^{path}: ?.*{message}"):
            parse("--config", str(path), *flags)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read: No such file"):
        parse("--config", str(tmp_path / "nowhere.yaml"))


def test_an_empty_file_gives_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").touch()
    assert load_config(tmp_path / "empty.yaml") == load_config()
