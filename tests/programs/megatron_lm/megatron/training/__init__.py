"""Stands for Megatron-LM's package of this name: the same kinds of assumptions about CUDA, triton
and the command line, in a few lines.
"""

import argparse
from typing import get_args

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from megatron.core import parallel_state
from megatron.core.datasets import helpers_cpp, utils
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

HAVE_TRITON = True


@triton.jit
def kernel(pointer, size: tl.constexpr):
    raise AssertionError("nobody calls kernels")


def parse_args():
    field = TransformerConfig.__dataclass_fields__["moe_token_dispatcher_type"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--moe-token-dispatcher-type", choices=get_args(field.type))
    parser.add_argument("--train-iters", type=int)
    return parser.parse_args()


def initialize(args):
    assert torch.cuda.is_available(), "Megatron requires CUDA."
    assert torch.cuda.device_count() > 0
    torch.cuda.set_device(0)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    utils.compile_helpers()
    assert helpers_cpp.build_sample_idx_int32
    model_parallel_cuda_manual_seed(1234)


def build_model(args):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        moe_ffn_hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_token_dispatcher_type=args.moe_token_dispatcher_type,
        expert_model_parallel_size=dist.get_world_size(),
        add_bias_linear=False,
        params_dtype=torch.float32,
    )
    layer = build_module(get_moe_module_spec(use_te=False, num_experts=4), config=config)
    layer.set_layer_number(1)
    return layer.cuda(torch.cuda.current_device())


def train(args, forward_step):
    model = build_model(args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(args.train_iters):
        optimizer.zero_grad()
        loss = forward_step(model)
        loss.backward()
        optimizer.step()
        total = torch.zeros(1, dtype=torch.float, device="cuda") + loss.detach()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"lm loss: {total.item():.9E}", flush=True)  # noqa: T201
    dist.destroy_process_group()


def pretrain(forward_step):
    args = parse_args()
    initialize(args)
    train(args, forward_step)
