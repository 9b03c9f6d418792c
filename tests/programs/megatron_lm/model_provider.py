"""Beside the program, as in a checkout of Megatron-LM."""

import torch


def make_batch():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, 16, 2, 32, generator=generator)
