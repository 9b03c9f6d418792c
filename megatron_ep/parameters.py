"""Numbers of parameters, computed from a configuration alone.

    embedding, output   vocabulary * hidden (once when tied)
    attention           grouped-query, or multi-head latent with its low-rank projections
    MLP                 dense, or router + experts + shared experts

The multi-token prediction module is counted apart: published sizes leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_ep.config import Config
from megatron_ep.config.build import transformer_config
from megatron_ep.tokenizer import padded_vocab_size


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of the whole model, over all ranks.

    Attributes:
        total: all, without multi-token prediction.
        active: those that one token uses.
        experts: those of routed experts, a part of total.
        prediction: those of the multi-token prediction module, its layers without the embedding
            and output that it shares.
    """

    total: int
    active: int
    experts: int
    prediction: int


def count_parameters(config: Config, *, vocab_size: int) -> ParameterCount:
    """Counts the parameters of the model that a configuration describes.

    Args:
        config: the settings.
        vocab_size: of the model, not padded.

    Example:
        >>> config = make_config({"model": {"num_layers": 1}, "moe": {"num_experts": 4}})
        >>> count_parameters(config, vocab_size=64).experts == 4 * 3 * 128 * 512
        True
    """
    model, core = config.model, transformer_config(config, use_te=False)
    hidden = model.hidden_size
    norm = hidden * (2 if model.normalization == "LayerNorm" else 1)
    embedding = hidden * padded_vocab_size(
        vocab_size,
        divisible_by=model.make_vocab_size_divisible_by,
        tensor_parallel_size=config.parallelism.tensor_model_parallel_size,
    )
    outside = embedding * (2 if model.untie_embeddings_and_output_weights else 1) + norm
    if model.position_embedding_type == "learned_absolute":
        outside += hidden * (model.max_position_embeddings or model.seq_length)

    attention = _attention(core) + 2 * norm
    per_expert = _mlp(core, core.moe_ffn_hidden_size or core.ffn_hidden_size)
    router_and_shared = _outside_experts(core)
    is_moe = layers_with_experts(config)
    num_moe = sum(is_moe)
    dense = (len(is_moe) - num_moe) * _mlp(core, core.ffn_hidden_size)
    common = outside + len(is_moe) * attention + dense + num_moe * router_and_shared
    num_experts, num_active = core.num_moe_experts or 0, core.moe_router_topk
    experts = num_moe * num_experts * per_expert
    layer = attention + router_and_shared + num_experts * per_expert
    return ParameterCount(
        total=common + experts,
        active=common + num_moe * num_active * per_expert,
        experts=experts,
        # Two norms of the inputs, their projection to hidden, a layer, and a norm at the end.
        prediction=(core.mtp_num_layers or 0) * (3 * norm + 2 * hidden * hidden + layer),
    )


def layers_with_experts(config: Config) -> list[bool]:
    """For each layer of the decoder, whether it has experts."""
    num_layers, frequency = config.model.num_layers, config.moe.moe_layer_freq
    if config.moe.num_experts is None:
        return [False] * num_layers
    if isinstance(frequency, list):
        return [bool(flag) for flag in frequency]
    return [i % frequency == 0 for i in range(num_layers)]


def num_mtp_layers(config: Config) -> int:
    """Layers of multi-token prediction, each like the last one of the decoder."""
    return config.transformer.get("mtp_num_layers") or 0


def _attention(core: Any) -> int:
    """Projections of an attention, its norms of queries and keys, and biases."""
    hidden, heads = core.hidden_size, core.num_attention_heads
    if core.multi_latent_attention:
        return _latent_attention(core)
    query = heads * core.kv_channels
    key_value = 2 * (core.num_query_groups or heads) * core.kv_channels
    weights = hidden * (query + key_value) + query * hidden
    if core.add_bias_linear:
        weights += query + key_value + hidden
    elif core.add_qkv_bias:
        weights += query + key_value
    norms = 2 if core.normalization == "RMSNorm" else 4
    return weights + (norms * core.kv_channels if core.qk_layernorm else 0)


def _latent_attention(core: Any) -> int:
    hidden, heads = core.hidden_size, core.num_attention_heads
    query_head = core.qk_head_dim + core.qk_pos_emb_head_dim
    rank, query_rank = core.kv_lora_rank, core.q_lora_rank
    if query_rank:
        weights = hidden * query_rank + query_rank * heads * query_head
    else:
        weights = hidden * heads * query_head
    weights += hidden * (rank + core.qk_pos_emb_head_dim)
    weights += rank * heads * (core.qk_head_dim + core.v_head_dim)
    weights += heads * core.v_head_dim * hidden
    return weights + ((query_rank or 0) + rank if core.qk_layernorm else 0)


def _mlp(core: Any, ffn_hidden_size: int) -> int:
    inner = ffn_hidden_size * (2 if core.gated_linear_unit else 1)
    weights = core.hidden_size * (inner + ffn_hidden_size)
    return weights + (inner + core.hidden_size if core.add_bias_linear else 0)


def _outside_experts(core: Any) -> int:
    """Router and shared experts of a layer."""
    weights = core.hidden_size * (core.num_moe_experts or 0)
    if core.moe_shared_expert_intermediate_size:
        weights += _mlp(core, core.moe_shared_expert_intermediate_size)
    return weights
