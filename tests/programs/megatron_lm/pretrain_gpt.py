"""Stands for Megatron-LM's program of this name."""

import sys
from functools import partial

import megatron.training
import torch
import torch.distributed as dist
from megatron.core.transformer.moe import fused_a2a
from megatron.training import pretrain
from model_provider import make_batch


def forward_step(batch, model):
    tokens = batch[dist.get_rank()].cuda(non_blocking=True)
    output, _ = model(tokens)
    return (output - tokens.flip(0)).square().mean()


if __name__ == "__main__":
    assert fused_a2a.HAVE_DEEP_EP
    assert not megatron.training.HAVE_TRITON
    assert sys.argv[0].endswith("pretrain_gpt.py")
    torch.cuda.synchronize()
    pretrain(partial(forward_step, make_batch()))
