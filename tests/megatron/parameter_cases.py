"""Models built on torch's meta device by a rank, to compare their parameters with a count."""

from unittest import mock

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp

from megatron_ep import model
from megatron_ep.config import make_config
from megatron_ep.config.build import transformer_config
from megatron_ep.parameters import count_parameters
from megatron_ep.tokenizer import padded_vocab_size

VOCAB_SIZE = 300

MODELS = {
    "latent attention, dense first layer, shared expert, multi-token prediction": {
        "model": {
            "num_layers": 3,
            "hidden_size": 64,
            "ffn_hidden_size": 192,
            "multi_latent_attention": True,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_head_dim": 16,
            "qk_pos_emb_head_dim": 8,
            "v_head_dim": 12,
            "qk_layernorm": True,
            "rope_type": "rope",
            "mtp_num_layers": 1,
            "untie_embeddings_and_output_weights": True,
        },
        "moe": {
            "num_experts": 8,
            "moe_layer_freq": [0, 1, 1],
            "moe_ffn_hidden_size": 48,
            "moe_shared_expert_intermediate_size": 40,
        },
    },
    "biases, LayerNorm, learned positions": {
        "model": {
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "activation": "gelu",
            "position_embedding_type": "learned_absolute",
        },
    },
    "grouped queries, norms of heads, experts in every second layer": {
        "model": {
            "num_query_groups": 2,
            "kv_channels": 48,
            "qk_layernorm": True,
            "add_qkv_bias": True,
        },
        "moe": {"num_experts": 4, "moe_layer_freq": 2},
    },
}


def check_count(rank, name):
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ep.cpu_compat import enable_cpu

    enable_cpu()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    settings = {**MODELS[name], "moe": {**MODELS[name].get("moe", {})}}
    settings["moe"]["moe_token_dispatcher_type"] = "alltoall"
    config = make_config(settings)
    core_config = transformer_config(config, use_te=False)
    core_config.perform_initialization = False
    padded = padded_vocab_size(VOCAB_SIZE, divisible_by=64, tensor_parallel_size=1)
    # The attention proper has no parameters, and Megatron-Core's own refuses latent attention.
    attention = mock.patch.object(LocalSpecProvider, "core_attention", return_value=IdentityOp)
    te_linear = mock.patch.object(multi_latent_attention, "TELinear", torch.nn.Linear)
    with torch.device("meta"), attention, te_linear:
        built = model._build_chunk(config, core_config, padded, use_te=False, vp_stage=None)
    count = count_parameters(config, vocab_size=VOCAB_SIZE)
    total, experts = model.count_parameters([built])
    assert count.total + count.prediction == total
    if not count.prediction:
        assert count.experts == sum(
            p.numel() for key, p in built.named_parameters() if ".local_experts." in key
        )
    parallel_state.destroy_model_parallel()
