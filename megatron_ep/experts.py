"""The experts of a rank on torch's grouped GEMM: one call for all of them in each GEMM.

    experts        GEMMs of forward and backward, L local experts     the host knows group sizes
    sequential     6 L launches                                       yes
    te             6 L launches, in calls of Transformer Engine       yes
    torch          6 calls of two launches (grouped_gemm.py)          no: they stay on the device

Weights lie as torch's Linear has them, those of all experts in one tensor. Checkpoints have the
names and shapes of Megatron-Core's SequentialMLP and TEGroupedMLP, optimizer states included, so
that each loads what another saved.

Symbols as in token_dispatcher.py, and:
    I  width of rows (hidden, or latent size)    F  width inside an expert, of this rank's slice
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.fusions.fused_bias_geglu import quick_gelu, weighted_bias_quick_geglu_impl
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.fusions.fused_weighted_squared_relu import weighted_squared_relu_impl
from megatron.core.tensor_parallel.layers import (
    _initialize_affine_weight_cpu,
    _initialize_affine_weight_gpu,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

from megatron_ep.grouped_gemm import ROW_BYTES, grouped_mm, has_kernel

LINEARS = {"weight1": "linear_fc1", "weight2": "linear_fc2"}
"""Of a parameter, the name in checkpoints."""


@dataclass(frozen=True)
class GroupEnds:
    """What TorchGroupedMLP takes in place of tokens per expert.

    Attributes:
        ends: [L] int32 on the device of the rows: past the last row of each expert, padding
            included. Rows past the last group belong to no expert.
    """

    ends: torch.Tensor


class TorchGroupedMLP(MegatronModule):
    """Experts in place of Megatron-Core's GroupedMLP, TEGroupedMLP or SequentialMLP.

    From the same random state it draws the weights that SequentialMLP draws.

    Attributes:
        result_memory: by the device of the rows, the context in which the result is allocated.

    Args:
        num_local_experts: L.
        config: of the layer.
        submodules: None.
        pg_collection: process groups; ep, expt_tp and expt_dp are used.

    Raises:
        ValueError: the config asks for what these experts do not have: biases, fp8 or fp4, another
            activation module; or, on a GPU, for a dtype or widths for which torch has no kernel.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        self.result_memory: Callable[[torch.device], AbstractContextManager[Any]] = any_memory
        width = config.moe_latent_size or config.hidden_size
        inner, rest = divmod(config.moe_ffn_hidden_size, self.tp_group.size())
        _check_config(config)
        if rest:
            raise ValueError(
                f"moe_ffn_hidden_size={config.moe_ffn_hidden_size} is not divisible by the expert "
                f"tensor parallel size {self.tp_group.size()}"
            )
        device = torch.device("cpu")
        if torch.cuda.is_available() and not config.use_cpu_initialization:
            device = torch.device("cuda", torch.cuda.current_device())
            _check_kernel(device, config.params_dtype, width, inner)
        num_halves = 2 if config.gated_linear_unit else 1
        new = functools.partial(torch.empty, device=device, dtype=config.params_dtype)
        self.weight1 = torch.nn.Parameter(new(num_local_experts, num_halves * inner, width))
        self.weight2 = torch.nn.Parameter(new(num_local_experts, width, inner))
        if config.perform_initialization:
            self._draw_weights()
        for weight, partition_dim in ((self.weight1, 1), (self.weight2, 2)):
            set_tensor_model_parallel_attributes(weight, True, partition_dim, 1)
            weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
        self.register_load_state_dict_post_hook(_forget_extra_states)

    def _draw_weights(self) -> None:
        """Expert after expert, as SequentialMLP does."""
        config, tp_size = self.config, self.tp_group.size()
        num_halves = 2 if config.gated_linear_unit else 1
        for fc1, fc2 in zip(self.weight1.data, self.weight2.data):
            for weight, init_method, dim, stride in (
                (fc1, config.init_method, 0, num_halves),
                (fc2, config.output_layer_init_method, 1, 1),
            ):
                if not config.use_cpu_initialization:
                    _initialize_affine_weight_gpu(weight, init_method, dim, is_expert=True)
                    continue
                whole = [size * (tp_size if i == dim else 1) for i, size in enumerate(weight.shape)]
                _initialize_affine_weight_cpu(
                    weight,
                    *whole,
                    per_partition_size=weight.shape[dim],
                    partition_dim=dim,
                    init_method=init_method,
                    stride=stride,
                    params_dtype=config.params_dtype,
                    rank=self.tp_group.rank(),
                    world_size=tp_size,
                )

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor | GroupEnds,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Computes with the rows of each expert.

        Args:
            permuted_local_hidden_states: [N, I], grouped by expert.
            tokens_per_expert: [L] int, on any device, or where groups end.
            permuted_probs: [N].

        Returns:
            [N, I], and no bias. With GroupEnds rows past the last group are unspecified.
        """
        config, rows = self.config, permuted_local_hidden_states
        ends = _ends_of(tokens_per_expert, rows.device)
        probs = permuted_probs.unsqueeze(-1)
        if config.moe_apply_probs_on_input:
            rows, probs = (probs * rows).to(rows.dtype), torch.ones_like(probs)
        gemm = functools.partial(
            grouped_mm, ends=ends, adds_to_main_grad=config.gradient_accumulation_fusion
        )
        inner = gemm(rows, self.weight1)
        if not _recomputes_activation(config):
            activated = _activate(config, inner, probs)
            with self.result_memory(rows.device):
                return gemm(activated, self.weight2), None
        # Without fp8 it needs nothing of Transformer Engine.
        checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=None)
        activate = functools.partial(_activate, config)
        activated = checkpoint.checkpoint(activate, inner, probs)
        with self.result_memory(rows.device):
            output = gemm(activated, self.weight2)
        checkpoint.discard_output_and_register_recompute(output)
        return output, None

    def backward_dw(self) -> None:
        """Nothing: the backward computes gradients of weights itself."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For Megatron-Core's dist_checkpointing, in the format of its own experts."""
        is_singleton = (metadata or {}).get("singleton_local_shards", False)
        shards = _Shards(
            sharded_offsets=sharded_offsets,
            ep=(self.ep_group.rank(), self.ep_group.size()),
            tp=(self.tp_group.rank(), self.tp_group.size()),
            num_local_experts=self.num_local_experts,
            is_singleton=is_singleton,
        )
        replica_id = 0, 0, self.dp_group.rank()
        state: dict[str, Any] = {}
        for name, linear in LINEARS.items():
            is_gated = name == "weight1" and self.config.gated_linear_unit
            state[f"{prefix}{name}"] = ShardedTensorFactory(
                f"{prefix}experts.{linear}.weight",
                getattr(self, name),
                functools.partial(
                    shards.build, tp_axis=0 if name == "weight1" else 1, is_gated=is_gated
                ),
                functools.partial(shards.merge, is_gated=is_gated),
                replica_id,
            )
        replica_id = 0, self.tp_group.rank(), self.dp_group.rank()
        for expert in shards.experts():
            for linear in LINEARS.values():
                key, offsets = shards.of_expert(f"{prefix}experts.{linear}._extra_state", expert)
                state[f"{prefix}expert{expert}.{linear}._extra_state"] = (
                    make_sharded_object_for_checkpoint(None, key, offsets, replica_id)
                )
        return state


def any_memory(device: torch.device) -> AbstractContextManager[Any]:
    """A TorchGroupedMLP's result_memory as long as nobody sets another."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class _Shards:
    """The parts of a checkpoint that this rank's experts are.

    Attributes:
        sharded_offsets: (axis, rank, number) of axes that come before the experts'.
        ep, tp: rank and size.
        is_singleton: an expert, and a half of a gated one, has keys of its own; otherwise experts
            are an axis and halves follow one another.
    """

    sharded_offsets: tuple[Any, ...]
    ep: tuple[int, int]
    tp: tuple[int, int]
    num_local_experts: int
    is_singleton: bool

    def experts(self) -> Iterator[int]:
        """Global indices."""
        begin = self.ep[0] * self.num_local_experts
        return iter(range(begin, begin + self.num_local_experts))

    def of_expert(self, key: str, expert: int) -> tuple[str, tuple[Any, ...]]:
        """Key and offsets of what belongs to one expert."""
        if self.is_singleton:
            head, _, tail = key.rpartition("experts.")
            return f"{head}experts.{expert}.{tail}", self.sharded_offsets
        num_experts = self.ep[1] * self.num_local_experts
        axis = len(self.sharded_offsets)
        return key, (*self.sharded_offsets, (axis, expert, num_experts))

    @torch.no_grad()
    def build(
        self,
        key: str,
        weight: torch.Tensor,
        replica_id: Any,
        flattened_range: slice | None = None,
        *,
        tp_axis: int,
        is_gated: bool,
    ) -> Any:
        """Sharded tensors of a weight [L, O, I], or of the optimizer's state for it."""
        if flattened_range is not None:
            raise ValueError(
                f"{key}: a checkpoint with flattened optimizer states is not supported"
            )
        halves = weight.chunk(2, dim=1) if is_gated else (weight,)
        build = self._build_singletons if self.is_singleton else self._build_stacked
        built = [
            build(key, half, replica_id, tp_axis=tp_axis, half=(index, len(halves)))
            for index, half in enumerate(halves)
        ]
        return built if is_gated else built[0]

    def _build_stacked(
        self, key: str, weight: torch.Tensor, replica_id: Any, *, tp_axis: int, half: Any
    ) -> ShardedTensor:
        axis = len(self.sharded_offsets)
        (index, num_halves), (rank, size) = half, self.tp
        return ShardedTensor.from_rank_offsets(
            key,
            weight.contiguous(),
            *self.sharded_offsets,
            (axis, *self.ep),
            (axis + 1 + tp_axis, index * size + rank, num_halves * size),
            replica_id=replica_id,
            prepend_axis_num=axis,
        )

    def _build_singletons(
        self, key: str, weight: torch.Tensor, replica_id: Any, *, tp_axis: int, half: Any
    ) -> list[ShardedTensor]:
        index, num_halves = half
        suffix = f"_{'wv'[index]}" if num_halves == 2 else ""
        axis = len(self.sharded_offsets)
        return [
            ShardedTensor.from_rank_offsets(
                self.of_expert(f"{key}{suffix}", expert)[0],
                of_expert.contiguous(),
                *self.sharded_offsets,
                (axis + tp_axis, *self.tp),
                replica_id=replica_id,
                prepend_axis_num=axis,
            )
            for expert, of_expert in zip(self.experts(), weight)
        ]

    @torch.no_grad()
    def merge(self, loaded: Any, *, is_gated: bool) -> torch.Tensor:
        """[L, O, I] of what build() describes."""
        halves = loaded if is_gated else [loaded]
        if self.is_singleton:
            halves = [torch.stack(list(half)) for half in halves]
        return torch.cat(list(halves), dim=1) if is_gated else halves[0]


def weights_of(experts: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two weights of each local expert, [O, I], as parts of the parameters.

    Raises:
        TypeError: experts of another kind than those of this module's table.
    """
    if isinstance(experts, TorchGroupedMLP):
        return list(zip(experts.weight1.detach(), experts.weight2.detach()))
    if hasattr(experts, "local_experts"):
        return [(e.linear_fc1.weight, e.linear_fc2.weight) for e in experts.local_experts]
    if hasattr(experts, "linear_fc1"):
        linears = experts.linear_fc1, experts.linear_fc2
        return [
            tuple(getattr(linear, f"weight{i}") for linear in linears)
            for i in range(experts.num_local_experts)
        ]
    raise TypeError(f"experts of the unknown kind {type(experts).__name__}")


def _check_config(config: Any) -> None:
    for name in ("add_bias_linear", "fp8", "fp4", "use_te_activation_func"):
        if getattr(config, name, None):
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not possible with experts='torch', but with "
                "Megatron's own"
            )


def _check_kernel(device: torch.device, dtype: torch.dtype, *widths: int) -> None:
    """Raises ValueError unless a GEMM of all experts is one launch."""
    if not has_kernel(device, dtype):
        raise ValueError(
            f"experts='torch' with params_dtype={dtype} on {torch.cuda.get_device_name(device)}, "
            f"torch {torch.__version__}: torch has a grouped GEMM for torch.bfloat16 on GPUs of "
            "compute capability 9 and 10; Megatron's own experts do without"
        )
    for width in widths:
        if width * dtype.itemsize % ROW_BYTES:
            raise ValueError(
                f"experts='torch' with rows of {width} elements of {dtype}, hidden or inside of an "
                f"expert: torch's grouped GEMM needs multiples of {ROW_BYTES} bytes"
            )


def _ends_of(tokens_per_expert: torch.Tensor | GroupEnds, device: torch.device) -> torch.Tensor:
    if isinstance(tokens_per_expert, GroupEnds):
        return tokens_per_expert.ends
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)  # pageable memory: staged, and free to go


def _recomputes_activation(config: Any) -> bool:
    return config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules


def _activate(config: Any, inner: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """[N, F] or, gated, [N, 2 F] -> [N, F] times [N, 1], as Megatron-Core's experts do it.

    Row by row: rows that belong to no expert touch no other.
    """
    function, is_gated = config.activation_func, config.gated_linear_unit
    fused: Any = None
    if config.bias_activation_fusion:
        if is_gated and function is F.silu:
            fused = weighted_bias_swiglu_impl(
                inner, None, probs, config.activation_func_fp8_input_store
            )
        elif is_gated and function is quick_gelu:
            fused = weighted_bias_quick_geglu_impl(
                inner,
                None,
                probs,
                config.activation_func_fp8_input_store,
                config.glu_linear_offset,
                config.activation_func_clamp_value,
            )
        else:
            raise ValueError(
                f"bias_activation_fusion=True: no fused activation for {function} of experts"
            )
    elif function is squared_relu and config.use_fused_weighted_squared_relu:
        fused = weighted_squared_relu_impl(inner, probs)
    if fused is not None:
        return fused
    if is_gated:
        gate, linear = inner.chunk(2, dim=-1)
        if (bound := config.activation_func_clamp_value) is not None:
            gate, linear = gate.clamp(max=bound), linear.clamp(min=-bound, max=bound)
        inner = function(gate) * (linear + config.glu_linear_offset)
    else:
        inner = function(inner)
    return (inner * probs).to(inner.dtype)


def _forget_extra_states(_module: Any, incompatible_keys: Any) -> None:
    """Checkpoints have states of the experts' GEMMs, which are none here."""
    keys = incompatible_keys.unexpected_keys
    keys[:] = [key for key in keys if not ("experts." in key and key.endswith("_extra_state"))]
