"""Rules between settings, as messages; what one field alone must satisfy is in the schema."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_ep.config.errors import ConfigError
from megatron_ep.config.fields import latent_attention_fields
from megatron_ep.config.layout import pipeline_layout
from megatron_ep.config.schema import Config


def check_rules(config: Config) -> list[str]:
    """What is wrong with the combination of settings."""
    return [
        *_model_rules(config),
        *_layout_rules(config),
        *_cuda_graph_rules(config),
        *_moe_rules(config),
        *_training_rules(config),
        *_checkpoint_rules(config),
        *_ep_rules(config),
    ]


def check_world_size(config: Config, world_size: int) -> list[str]:
    """What is wrong with the parallel sizes for this number of ranks."""
    sizes = config.parallelism
    problems = []
    dense = (
        sizes.tensor_model_parallel_size
        * sizes.pipeline_model_parallel_size
        * sizes.context_parallel_size
    )
    expert = (
        (sizes.expert_tensor_parallel_size or sizes.tensor_model_parallel_size)
        * sizes.expert_model_parallel_size
        * sizes.pipeline_model_parallel_size
    )
    if world_size % dense:
        problems.append(
            f"{world_size} ranks are not divisible by tensor * pipeline * context parallel size "
            f"= {dense}"
        )
    if world_size % expert:
        problems.append(
            f"{world_size} ranks are not divisible by expert tensor * expert * pipeline parallel "
            f"size = {expert}"
            + ("" if sizes.expert_tensor_parallel_size else _expert_tp_hint(config))
        )
    if not problems and config.training.global_batch_size is not None:
        per_pass = config.training.micro_batch_size * (world_size // dense)
        if config.training.global_batch_size % per_pass:
            problems.append(
                f"training.global_batch_size = {config.training.global_batch_size} is not "
                f"divisible by micro_batch_size * data parallel size = {per_pass}"
            )
    return problems


def _ep_rules(config: Config) -> Iterator[str]:
    is_ours = config.moe.moe_token_dispatcher_type == "deepep" and config.moe.num_experts
    if config.logging.trace is not None and not is_ours:
        yield "logging.trace needs moe.moe_token_dispatcher_type = deepep, whose transfers it shows"
    experts, is_grouped = config.moe.moe_experts, config.moe.moe_grouped_gemm
    if experts in ("sequential", "torch") and is_grouped:
        yield f"moe.moe_experts = {experts} and moe.moe_grouped_gemm are two kinds of experts"
    if experts == "torch" and not is_ours:
        yield "moe.moe_experts = torch needs moe.moe_token_dispatcher_type = deepep"
    has_capacity = config.ep.capacity_factor is not None
    if has_capacity and (experts in ("sequential", "te") or is_grouped):
        yield (
            "ep.capacity_factor needs moe.moe_experts = torch: other experts have the host know "
            "how many rows they get"
        )
    if has_capacity and not is_ours:
        yield "ep.capacity_factor needs moe.moe_token_dispatcher_type = deepep"
    uses_torch = experts == "torch" or has_capacity
    if config.ep.overlap_weight_gradients and not (is_ours and uses_torch):
        yield (
            "ep.overlap_weight_gradients needs moe.moe_token_dispatcher_type = deepep and "
            "moe.moe_experts = torch"
        )
    if is_ours and uses_torch and config.model.add_bias_linear:
        yield "moe.moe_experts = torch has no biases: model.add_bias_linear must be off"

    if is_ours and config.ep.fp8_dispatch:
        yield from _fp8_dispatch_rules(config)


def _fp8_dispatch_rules(config: Config) -> Iterator[str]:
    from megatron_ep.fp8_rows import SCALE_GROUP

    name, hidden = "model.hidden_size", config.model.hidden_size
    if latent := config.transformer.get("moe_latent_size"):
        name, hidden = "transformer.moe_latent_size", latent
    if hidden % SCALE_GROUP:
        yield (
            f"ep.fp8_dispatch needs rows of whole groups of {SCALE_GROUP} channels, "
            f"{name} = {hidden}"
        )


def _expert_tp_hint(config: Config) -> str:
    if config.parallelism.tensor_model_parallel_size == 1:
        return ""
    return " (parallelism.expert_tensor_parallel_size = 1 does not slice experts)"


def _model_rules(config: Config) -> Iterator[str]:
    model, sizes = config.model, config.parallelism
    if not config.transformer.get("multi_latent_attention", False):
        for name in sorted(latent_attention_fields() & config.transformer.keys()):
            value = config.transformer[name]
            yield f"transformer.{name} = {value!r} needs multi_latent_attention = true"
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size = {model.hidden_size} is not divisible by num_attention_heads = "
            f"{model.num_attention_heads}"
        )
    groups = model.num_query_groups or model.num_attention_heads
    if model.num_attention_heads % groups:
        yield (
            f"model.num_attention_heads = {model.num_attention_heads} is not divisible by "
            f"num_query_groups = {groups}"
        )
    stages = sizes.pipeline_model_parallel_size * (sizes.virtual_pipeline_model_parallel_size or 1)
    uneven = [
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
    ]
    parts = ["account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"]
    parts = [name for name in parts if config.transformer.get(name)]
    is_uneven = any(config.transformer.get(name) is not None for name in uneven)
    if (model.num_layers + len(parts)) % stages and not is_uneven:
        more = "".join(f" + 1 ({name})" for name in parts)
        yield f"model.num_layers = {model.num_layers}{more} is not divisible by {stages} stages"
    if sizes.virtual_pipeline_model_parallel_size and sizes.pipeline_model_parallel_size == 1:
        yield "parallelism.virtual_pipeline_model_parallel_size needs pipeline stages"
    if (model.max_position_embeddings or model.seq_length) < model.seq_length:
        yield (
            f"model.max_position_embeddings = {model.max_position_embeddings} is less than "
            f"seq_length = {model.seq_length}"
        )
    if config.transformer.get("mtp_num_layers") and model.position_embedding_type not in (
        "rope",
        "none",
    ):
        yield (
            f"model.position_embedding_type = {model.position_embedding_type!r} does not work with "
            "mtp_num_layers: the stage that predicts further tokens would have positions of its own"
        )
    if model.seq_length % sizes.tensor_model_parallel_size:
        yield (
            f"model.seq_length = {model.seq_length} is not divisible by "
            f"tensor_model_parallel_size = {sizes.tensor_model_parallel_size}"
        )


def _cuda_graph_rules(config: Config) -> Iterator[str]:
    off = {"cuda_graph_impl": "none", "enable_cuda_graph": False, "external_cuda_graph": False}
    for name, value in off.items():
        given = config.transformer.get(name, value)
        if given != value:
            yield (
                f"transformer.{name} = {given!r}: this training captures no CUDA graphs; "
                "megatron_ep.capture_layer() captures MoE layers of a program of your own"
            )


def _layout_rules(config: Config) -> Iterator[str]:
    try:
        pipeline_layout(config)
    except ConfigError as error:
        yield str(error)


def _moe_rules(config: Config) -> Iterator[str]:
    moe, sizes = config.moe, config.parallelism
    if moe.num_experts is None:
        if sizes.expert_model_parallel_size > 1:
            yield "parallelism.expert_model_parallel_size > 1 needs moe.num_experts"
        return
    if moe.moe_router_topk > moe.num_experts:
        yield (
            f"moe.moe_router_topk = {moe.moe_router_topk} is more than num_experts = "
            f"{moe.num_experts}"
        )
    if moe.num_experts % sizes.expert_model_parallel_size:
        yield (
            f"moe.num_experts = {moe.num_experts} is not divisible by "
            f"parallelism.expert_model_parallel_size = {sizes.expert_model_parallel_size}"
        )
    if moe.moe_router_num_groups and moe.num_experts % moe.moe_router_num_groups:
        yield (
            f"moe.num_experts = {moe.num_experts} is not divisible by moe_router_num_groups = "
            f"{moe.moe_router_num_groups}"
        )
    if (moe.moe_router_group_topk or 0) > (moe.moe_router_num_groups or 0):
        yield (
            f"moe.moe_router_group_topk = {moe.moe_router_group_topk} is more than "
            f"moe_router_num_groups = {moe.moe_router_num_groups}"
        )
    if moe.moe_pad_expert_input_to_capacity and moe.moe_expert_capacity_factor is None:
        yield "moe.moe_pad_expert_input_to_capacity needs moe_expert_capacity_factor"
    kinds, coeffs = moe.moe_router_load_balancing_type, moe.moe_aux_loss_coeff
    if _length(kinds) != _length(coeffs):
        yield (
            f"moe.moe_aux_loss_coeff = {coeffs} has not one entry for each of "
            f"moe_router_load_balancing_type = {kinds}"
        )
    if isinstance(moe.moe_layer_freq, list) and len(moe.moe_layer_freq) != config.model.num_layers:
        yield (
            f"moe.moe_layer_freq has {len(moe.moe_layer_freq)} entries for "
            f"{config.model.num_layers} layers"
        )
    if sizes.tensor_model_parallel_size > 1 and sizes.sequence_parallel is False:
        yield "parallelism.sequence_parallel must be on for experts with tensor parallelism"


def _length(value: object) -> int | None:
    """Of a list; None for a single value."""
    return len(value) if isinstance(value, list) else None


def _training_rules(config: Config) -> Iterator[str]:
    schedule, optimizer = config.lr_schedule, config.optimizer
    decay_iters = schedule.lr_decay_iters or config.training.train_iters
    if schedule.lr_warmup_iters >= decay_iters:
        yield (
            f"lr_schedule.lr_warmup_iters = {schedule.lr_warmup_iters} is not less than "
            f"lr_decay_iters = {decay_iters}"
        )
    if schedule.lr_decay_style == "WSD" and schedule.lr_wsd_decay_iters is None:
        yield "lr_schedule.lr_decay_style = 'WSD' needs lr_wsd_decay_iters"
    wsd_iters, after_warmup = schedule.lr_wsd_decay_iters, decay_iters - schedule.lr_warmup_iters
    if schedule.lr_decay_style == "WSD" and (wsd_iters or 0) > after_warmup > 0:
        yield (
            f"lr_schedule.lr_wsd_decay_iters = {wsd_iters} is more than the {after_warmup} steps "
            f"between lr_warmup_iters = {schedule.lr_warmup_iters} and lr_decay_iters = "
            f"{decay_iters}: the learning rate would never be optimizer.lr"
        )
    if schedule.lr_warmup_init > optimizer.lr:
        yield (
            f"lr_schedule.lr_warmup_init = {schedule.lr_warmup_init} is more than optimizer.lr = "
            f"{optimizer.lr}"
        )
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr = {optimizer.min_lr} is more than lr = {optimizer.lr}"
    if config.parallelism.overlap_param_gather:
        if not config.parallelism.use_distributed_optimizer:
            yield "parallelism.overlap_param_gather needs use_distributed_optimizer"
        if not config.parallelism.overlap_grad_reduce:
            yield "parallelism.overlap_param_gather needs overlap_grad_reduce"
    if config.parallelism.use_distributed_optimizer and optimizer.optimizer != "adam":
        yield "parallelism.use_distributed_optimizer needs optimizer.optimizer = 'adam'"
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?){0,2}", config.data.split):
        yield f"data.split = {config.data.split!r} is not like '95,5,0': training, validation, test"
    elif not any(map(float, config.data.split.split(","))):
        yield f"data.split = {config.data.split!r}: every share is 0"
    kind = config.model.position_embedding_type
    if config.data.reset_position_ids and kind != "learned_absolute":
        yield (
            f"data.reset_position_ids = True, model.position_embedding_type = {kind!r}: only "
            "'learned_absolute' looks at these positions"
        )
    if config.data.reset_attention_mask and config.transformer.get("masked_softmax_fusion"):
        yield "data.reset_attention_mask: masked_softmax_fusion = True would look at no mask"
    is_huggingface = config.tokenizer.tokenizer_type == "huggingface"
    if is_huggingface and config.tokenizer.tokenizer_model is None:
        yield "tokenizer.tokenizer_type = 'huggingface' needs tokenizer_model"


def _checkpoint_rules(config: Config) -> Iterator[str]:
    section = config.checkpoint
    if section.save_interval and section.save is None:
        yield "checkpoint.save_interval needs checkpoint.save"
    if section.finetune and section.load is None:
        yield "checkpoint.finetune needs checkpoint.load"
    if not section.auto_resume or section.save is None or section.loads_from_elsewhere:
        return
    for name in ("finetune", "ckpt_step"):
        if value := getattr(section, name):
            yield (
                f"checkpoint.{name} = {value}, checkpoint.save = {section.save!r}: a run that is "
                f"restarted would begin there again; name another directory in checkpoint.save "
                "and this one in checkpoint.load, or set auto_resume = false"
            )
