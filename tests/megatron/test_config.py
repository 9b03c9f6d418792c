"""A configuration is checked as a whole, and every error says which setting is wrong and why."""

import pytest
import torch
from programs import ROOT

from megatron_ep.config import (
    ConfigError,
    check_world_size,
    config_from_arguments,
    dump_config,
    load_config,
    make_config,
)

pytestmark = [
    pytest.mark.usefixtures("megatron_here"),
    pytest.mark.filterwarnings("ignore::UserWarning:megatron"),
]

CONFIG_FILES = sorted((ROOT / "configs").glob("*.yaml"))


def error_of(values):
    with pytest.raises(ConfigError) as raised:
        make_config(values)
    return str(raised.value)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_a_file_of_this_repository_is_valid(path):
    load_config(path)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_a_configuration_reads_back_as_it_was_written(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_the_quickstart_fits_two_ranks():
    assert check_world_size(load_config(ROOT / "configs/quickstart.yaml"), 2) == []


def test_fields_of_megatron_read_back_as_they_were_written(tmp_path):
    config = make_config(
        {
            "model": {"window_size": [3, 0], "position_embedding_type": "none"},
            "moe": {"moe_router_padding_for_fp8": True},
            "transformer": {"recompute_modules": ["moe"], "attention_backend": "local"},
        }
    )
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert config.transformer["window_size"] == (3, 0)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("moe", "moe_router_topkk", "moe.moe_router_topkk: unknown key; did you mean"),
        ("moe", "moe_router_topkk", "'moe_router_topk'"),
        ("moe", "topk", "moe.topk: unknown key; did you mean 'moe_router_topk'?"),
        ("model", "lr", "model.lr: unknown key; did you mean 'optimizer.lr'?"),
        ("model", "recompute_granularty", "did you mean 'recompute_granularity'?"),
        ("training", "window_size", "did you mean 'transformer.window_size'?"),
        ("transformer", "num_layers", "did you mean 'model.num_layers'?"),
        ("model", "xyzzy", "model.xyzzy: unknown key\n"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(section, key, message):
    assert message in error_of({section: {key: 1}}) + "\n"


def test_an_unknown_section_is_named_with_the_nearest_known_one():
    assert "modle: unknown section; did you mean 'model'?" in error_of({"modle": {}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "num_layers", "four"),
        ("model", "num_layers", 4.5),
        ("model", "num_layers", -1),
        ("model", "num_layers", True),
        ("model", "precision", "fp31"),
        ("model", "add_bias_linear", "perhaps"),
        ("moe", "moe_layer_freq", [1, 0, "x"]),
        ("moe", "moe_router_load_balancing_type", "auxloss"),
        ("optimizer", "lr", float("nan")),
        ("optimizer", "lr", float("inf")),
        ("data", "data_path", "corpus"),
        ("data", "data_path", None),
        ("transformer", "window_size", "wide"),
        ("transformer", "window_size", True),
        ("transformer", "recompute_granularity", "selectiv"),
        ("transformer", "attention_backend", "flush"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_its_key(section, key, value):
    message = error_of({section: {key: value}})
    assert f"{section}.{key}: " in message
    assert f"got {value!r}" in message


def test_all_errors_are_reported_at_once():
    message = error_of({"model": {"num_layer": 2, "hidden_size": "x"}, "moe": 3})
    assert message.count("\n  ") == 3
    for key in ("model.num_layer:", "model.hidden_size:", "moe: expected keys and values, got 3"):
        assert key in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"moe": {"num_experts": 4, "moe_router_topk": 5}},
            "moe.moe_router_topk = 5 is more than num_experts = 4",
        ),
        (
            {"moe": {"num_experts": 4}, "parallelism": {"expert_model_parallel_size": 3}},
            "moe.num_experts = 4 is not divisible by parallelism.expert_model_parallel_size = 3",
        ),
        (
            {"parallelism": {"expert_model_parallel_size": 2}},
            "parallelism.expert_model_parallel_size > 1 needs moe.num_experts",
        ),
        (
            {"moe": {"num_experts": 4, "moe_router_num_groups": 2, "moe_router_group_topk": 3}},
            "moe.moe_router_group_topk = 3 is more than moe_router_num_groups = 2",
        ),
        (
            {"moe": {"num_experts": 4, "moe_pad_expert_input_to_capacity": True}},
            "needs moe_expert_capacity_factor",
        ),
        (
            {"moe": {"num_experts": 4, "moe_router_load_balancing_type": ["aux_loss"]}},
            "moe.moe_aux_loss_coeff = 0.0 has not one entry for each of",
        ),
        (
            {"moe": {"num_experts": 4, "moe_experts": "torch", "moe_grouped_gemm": True}},
            "moe.moe_experts = torch and moe.moe_grouped_gemm are two kinds of experts",
        ),
        (
            {
                "moe": {
                    "num_experts": 4,
                    "moe_experts": "torch",
                    "moe_token_dispatcher_type": "alltoall",
                }
            },
            "moe.moe_experts = torch needs moe.moe_token_dispatcher_type = deepep",
        ),
        (
            {
                "model": {"num_layers": 3, "account_for_embedding_in_pipeline_split": False},
                "parallelism": {"pipeline_model_parallel_size": 2},
            },
            "model.num_layers = 3 is not divisible by 2 stages",
        ),
        (
            {"moe": {"num_experts": 4}, "ep": {"overlap_weight_gradients": True}},
            "ep.overlap_weight_gradients needs moe.moe_token_dispatcher_type = deepep and moe",
        ),
        (
            {"moe": {"num_experts": 4, "moe_experts": "te"}, "ep": {"capacity_factor": 2.0}},
            "ep.capacity_factor needs moe.moe_experts = torch",
        ),
        (
            {
                "moe": {"num_experts": 4},
                "ep": {"capacity_factor": 2.0},
                "model": {"add_bias_linear": True},
            },
            "moe.moe_experts = torch has no biases",
        ),
        (
            {"moe": {"num_experts": 4, "moe_layer_freq": [0, 1]}, "model": {"num_layers": 3}},
            "moe.moe_layer_freq has 2 entries for 3 layers",
        ),
        (
            {"model": {"hidden_size": 30, "num_attention_heads": 4}},
            "model.hidden_size = 30 is not divisible by num_attention_heads = 4",
        ),
        (
            {"model": {"max_position_embeddings": 8, "seq_length": 16}},
            "model.max_position_embeddings = 8 is less than seq_length = 16",
        ),
        ({"data": {"split": "most of it"}}, "data.split = 'most of it' is not like '95,5,0'"),
        (
            {"parallelism": {"use_distributed_optimizer": True}, "optimizer": {"optimizer": "sgd"}},
            "use_distributed_optimizer needs optimizer.optimizer = 'adam'",
        ),
        ({"optimizer": {"lr": 1e-4, "min_lr": 1e-3}}, "min_lr = 0.001 is more than lr = 0.0001"),
        ({"checkpoint": {"save_interval": 5}}, "checkpoint.save_interval needs checkpoint.save"),
        (
            {"model": {"mtp_num_layers": 1, "position_embedding_type": "learned_absolute"}},
            "model.position_embedding_type = 'learned_absolute' does not work with mtp_num_layers",
        ),
        (
            {"transformer": {"cuda_graph_impl": "local"}},
            "transformer.cuda_graph_impl = 'local': this training captures no CUDA graphs",
        ),
        (
            {"model": {"enable_cuda_graph": True}},
            "transformer.enable_cuda_graph = True: this training captures no CUDA graphs",
        ),
        (
            {
                "training": {"train_iters": 100},
                "lr_schedule": {
                    "lr_decay_style": "WSD",
                    "lr_warmup_iters": 10,
                    "lr_wsd_decay_iters": 91,
                },
            },
            "lr_wsd_decay_iters = 91 is more than the 90 steps between lr_warmup_iters = 10 and",
        ),
        (
            {"lr_schedule": {"lr_warmup_init": 2e-3}},
            "lr_schedule.lr_warmup_init = 0.002 is more than optimizer.lr = 0.001",
        ),
        ({"data": {"split": "0,0.0,0"}}, "data.split = '0,0.0,0': every share is 0"),
        (
            {"model": {"q_lora_rank": 16}},
            "transformer.q_lora_rank = 16 needs multi_latent_attention = true",
        ),
        (
            {"model": {"hidden_size": 64}, "moe": {"num_experts": 4}, "ep": {"fp8_dispatch": True}},
            "ep.fp8_dispatch needs rows of whole groups of 128 channels, model.hidden_size = 64",
        ),
        (
            {"model": {"position_embedding_type": "yarn"}},
            "model.position_embedding_type: Input should be 'learned_absolute', 'rope' or 'none'",
        ),
        (
            {"data": {"reset_position_ids": True}},
            "data.reset_position_ids = True, model.position_embedding_type = 'rope': only",
        ),
        ({"checkpoint": {"finetune": True}}, "checkpoint.finetune needs checkpoint.load"),
        (
            {"checkpoint": {"save": "run", "load": "./run", "finetune": True}},
            "checkpoint.finetune = True, checkpoint.save = 'run': a run that is restarted",
        ),
        (
            {"checkpoint": {"save": "run", "ckpt_step": 3}},
            "checkpoint.ckpt_step = 3, checkpoint.save = 'run': a run that is restarted",
        ),
        (
            {"model": {"window_size": [1, 0]}, "transformer": {"window_size": [2, 0]}},
            "transformer.window_size: stands in another section, too",
        ),
    ],
)
def test_a_contradiction_is_named_with_both_sides(values, message):
    assert message in error_of(values)


@pytest.mark.parametrize(
    ("num_layers", "split", "message"),
    [
        (7, {"account_for_loss_in_pipeline_split": True}, None),
        (
            6,
            {f"account_for_{part}_in_pipeline_split": True for part in ("embedding", "loss")},
            None,
        ),
        (
            6,
            {"num_layers_in_first_pipeline_stage": 2, "pipeline_model_parallel_layout": None},
            None,
        ),
        (6, {"account_for_loss_in_pipeline_split": False}, "= 6 is not divisible by 4 stages"),
        (6, {"num_layers_in_last_pipeline_stage": None}, "= 6 is not divisible by 4 stages"),
        (
            8,
            {"account_for_loss_in_pipeline_split": True},
            "= 8 + 1 (account_for_loss_in_pipeline_split) is not divisible by 4 stages",
        ),
    ],
)
def test_layers_need_not_be_divided_evenly_where_megatron_is_told_how(num_layers, split, message):
    values = {
        "model": {"num_layers": num_layers, **split},
        "parallelism": {"pipeline_model_parallel_size": 4},
    }
    if message is None:
        make_config(values)
    else:
        assert f"model.num_layers {message}" in error_of(values)


def test_a_number_of_ranks_that_does_not_fit_is_named():
    config = make_config(
        {
            "moe": {"num_experts": 4},
            "parallelism": {"expert_model_parallel_size": 2},
            "training": {"micro_batch_size": 3, "global_batch_size": 8},
        }
    )
    assert "3 ranks are not divisible by expert tensor * expert" in check_world_size(config, 3)[0]
    (problem,) = check_world_size(config, 2)
    assert problem.startswith("training.global_batch_size = 8 is not divisible by micro_batch_size")


def test_what_megatron_itself_refuses_is_an_error_of_the_configuration():
    from megatron_ep.config.build import transformer_config

    config = make_config(
        {"moe": {"num_experts": 4, "moe_router_enable_expert_bias": True}}  # needs sigmoid scores
    )
    with pytest.raises(ConfigError, match="Megatron-Core refuses these settings: .*xpert bias"):
        transformer_config(config, use_te=False)


@pytest.mark.parametrize(("flag", "value"), [("--no-load-rng", True), ("--load-rng", False)])
def test_flags_that_begin_with_no_are_no_opposites(flag, value):
    assert config_from_arguments([flag], program="test").checkpoint.no_load_rng is value


def test_settings_reach_the_fields_of_megatron():
    from megatron_ep.config.build import transformer_config

    config = make_config(
        {
            "model": {"activation": "swiglu", "precision": "bf16", "window_size": [4, 0]},
            "moe": {"num_experts": 8, "moe_router_topk": 3},
        }
    )
    core = transformer_config(config, use_te=False)
    assert (core.num_moe_experts, core.moe_router_topk, core.window_size) == (8, 3, (4, 0))
    assert core.gated_linear_unit
    assert core.params_dtype is torch.bfloat16
