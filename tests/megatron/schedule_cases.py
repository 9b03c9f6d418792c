"""Megatron's own 1F1B schedule of a transformer layer, on the CPU. Functions run on ranks.

The schedule runs the hooks of the dispatcher as separate nodes with detached inputs, frees those
inputs, and interleaves the forward of one micro-batch with the backward of another.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import moe_layers as layers
import torch
from moe_layers import Case

LAYER_OPTIONS = dict(
    masked_softmax_fusion=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    bias_dropout_fusion=False,
)


def make_transformer_layer(case, grid, dispatcher):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module

    model_parallel_cuda_manual_seed(layers.SEED, force_reset_rng=True)
    spec = get_gpt_layer_local_spec(num_experts=case.num_experts, normalization="RMSNorm")
    config = layers.make_config(case, grid, dispatcher)
    return build_module(spec, config=config, layer_number=1).to(case.dtype).train()


class _NoEvent:
    def wait(self, stream):
        pass

    record = wait


@contextlib.contextmanager
def without_cuda():
    """The schedule records tensors on streams and marks ranges for a profiler."""
    with (
        mock.patch.object(torch.Tensor, "record_stream"),
        mock.patch.object(torch.cuda.nvtx, "range_push"),
        mock.patch.object(torch.cuda.nvtx, "range_pop"),
    ):
        yield


def run_1f1b(layer, batches):
    """F0; F1 with B0; F2 with B1; B2. Returns what moe_layers.run_in_flight does."""
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerLayerSchedulePlan

    chunk_state = SimpleNamespace(
        model=SimpleNamespace(decoder=SimpleNamespace(final_layernorm=None)),
        **dict.fromkeys(
            [
                "attention_mask",
                "rotary_pos_emb",
                "rotary_pos_cos",
                "rotary_pos_sin",
                "packed_seq_params",
                "sequence_len_offset",
            ]
        ),
    )
    tensors, plan, grad, index = {}, None, None, None
    for next_index, (hidden, next_grad) in [*enumerate(batches), (None, (None, None))]:
        next_plan = None
        if hidden is not None:
            next_plan = TransformerLayerSchedulePlan(
                layer, _NoEvent(), chunk_state, None, None, dict(is_last_layer=True)
            )
        output, input_grad = TransformerLayerSchedulePlan.run(
            next_plan, plan, f_input=hidden, b_grad=grad, is_last_layer_in_bwd=True
        )
        if plan is not None:
            tensors[f"input.grad {index}"] = input_grad
        if output is not None:
            tensors[f"output {next_index}"] = output.detach().clone()
        plan, grad, index = next_plan, next_grad, next_index
    return tensors | layers.parameter_grads(layer)


def run_plain(layer, batches):
    tensors = {}
    for index, (hidden, grad) in enumerate(batches):
        output, _ = layer(hidden, attention_mask=None)
        output.backward(grad)
        tensors |= {f"output {index}": output.detach(), f"input.grad {index}": hidden.grad}
    return tensors | layers.parameter_grads(layer)


def compare_1f1b(rank, grid, num_experts):
    """The overlapped schedule with deepep against plain passes with alltoall."""
    case = Case(num_experts=num_experts, options=LAYER_OPTIONS)
    with layers.megatron(grid), without_cuda():
        judge, layer = (make_transformer_layer(case, grid, name) for name in ("alltoall", "deepep"))
        expected, actual = (
            run(each, [layers.make_input(rank, case, micro_batch=i) for i in range(3)])
            for run, each in ((run_plain, judge), (run_1f1b, layer))
        )
        return [layers.compare(rank, expected, actual)]
