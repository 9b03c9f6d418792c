"""What Megatron-Core 0.16 needs in order to run on CPU ranks, where there is no CUDA device.

Megatron-Core assumes CUDA in a few dozen places: it asks for the current device, names "cuda" in
tensor factories, keeps streams and CUDA random states. `enable_cpu()` answers those on a machine
without CUDA, so that models, data-parallel wrappers, optimizers, schedules and checkpoints run with
gloo. Each function below is one such assumption. Three tools keep the changes narrow:

    answer_megatron     torch.cuda.f() returns something else when code of Megatron calls it; for
                        every other caller it is as before
    _replace_constants  changes string constants of one function ("cuda" -> "cpu")
    plain assignment    of an attribute of Megatron's own

Where a later Megatron-Core no longer has the function or the constant, that step does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

_enabled = False


def enable_cpu() -> bool:
    """Lets Megatron-Core run on the CPU; call it before a model or a process group is made.

    Does nothing when CUDA is available or when it was called before.

    Returns:
        Whether Megatron-Core is set up for the CPU now.
    """
    global _enabled
    if _enabled or torch.cuda.is_available():
        return _enabled
    _import_quietly()
    for step in (
        define_fused_names,
        _use_cpu_as_current_device,
        _use_cpu_in_factories,
        _accept_cpu_tensor_types,
        _use_cpu_generator,
        _use_no_streams,
        _pass_splits_as_numpy,
        _run_fused_functions_eagerly,
    ):
        step()
    _enabled = True
    return True


def _import_quietly() -> None:
    """Imports Megatron-Core without its warnings about optional GPU packages, and without the
    compiler behind torch.compile: the functions that it marks run eagerly in any case.
    """
    original = torch.compile
    setattr(torch, "compile", _leave_as_is)  # noqa: B010
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in ("models.gpt", "optimizer", "distributed", "pipeline_parallel"):
                importlib.import_module(f"megatron.core.{name}")
    finally:
        setattr(torch, "compile", original)  # noqa: B010


def _leave_as_is(function: Any = None, **options: Any) -> Any:
    """In place of torch.compile, as a function or as a decorator with options."""
    return (lambda given: given) if function is None else function


def define_fused_names() -> None:
    """moe_utils leaves these names undefined without Transformer Engine, yet reads them; on GPUs,
    too.
    """
    from megatron.core.transformer.moe import moe_utils

    for name in (
        "fused_compute_score_for_moe_aux_loss",
        "fused_moe_aux_loss",
        "fused_permute",
        "fused_permute_with_probs",
        "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs",
        "fused_topk_with_score_function",
        "fused_unpermute",
        "te_general_gemm",
    ):
        if not hasattr(moe_utils, name):
            setattr(moe_utils, name, None)


def _use_cpu_as_current_device() -> None:
    """Tensors are made on torch.cuda.current_device() and moved with .cuda()."""
    answer_megatron(torch.cuda, "current_device", lambda: torch.device("cpu"))
    answer_megatron(torch.cuda, "synchronize", lambda *args, **kwargs: None)
    answer_megatron(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)


def _use_cpu_in_factories() -> None:
    """These functions say device="cuda" (forward_step: autocast for "cuda")."""
    for module, name in (
        ("optimizer.clip_grads", "get_grad_norm_fp32"),
        ("optimizer.clip_grads", "clip_grad_by_total_norm_fp32"),
        ("optimizer.clip_grads", "count_zeros_fp32"),
        ("optimizer.grad_scaler", "MegatronGradScaler.__init__"),
        ("optimizer.grad_scaler", "DynamicGradScaler.__init__"),
        ("optimizer.optimizer", "MixedPrecisionOptimizer.__init__"),
        ("optimizer.optimizer", "FP32Optimizer.__init__"),
        ("pipeline_parallel.schedules", "forward_step"),
        ("pipeline_parallel.schedules", "forward_backward_no_pipelining"),
        ("pipeline_parallel.schedules", "forward_backward_pipelining_with_interleaving"),
        ("pipeline_parallel.schedules", "forward_backward_pipelining_without_interleaving"),
        ("transformer.utils", "get_default_causal_mask"),
        ("transformer.utils", "get_sliding_window_causal_mask"),
        ("transformer.moe.moe_utils", "track_moe_metrics"),
        ("tensor_parallel.data", "_build_key_size_numel_dictionaries"),
        ("utils", "local_multi_tensor_l2_norm"),
        ("dist_checkpointing.exchange_utils", "_get_empty_tensor_for_exchange"),
        ("dist_checkpointing.exchange_utils", "exchange_loaded_tensors_gather_rounds"),
        ("dist_checkpointing.strategies.state_dict_saver", "verify_global_md_reuse"),
    ):
        _replace_constants(module, name)


def _accept_cpu_tensor_types() -> None:
    """The optimizers sort parameters by names of types, such as "torch.cuda.FloatTensor"."""
    for module, name in (
        ("optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__"),
        ("optimizer.distrib_optimizer", "DistributedOptimizer.__init__"),
        ("optimizer.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups"),
    ):
        _replace_constants(module, name)


def _use_cpu_generator() -> None:
    """The random states of tensor and expert parallelism are states of the CUDA generator.

    On the CPU they are states of the default generator. fork() is replaced too: it warns when the
    CPU generator moves, which is the purpose here.
    """
    from megatron.core.tensor_parallel import random as mcore_random

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
        if name not in self.states_:
            raise KeyError(f"random state {name!r} is not tracked; known: {sorted(self.states_)}")
        outer_name, outer_state = self._current_state_name, torch.get_rng_state()
        torch.set_rng_state(outer_state if name == outer_name else self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(self.states_[name] if name == outer_name else outer_state)
            self._current_state_name = outer_name

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
    mcore_random.CudaRNGStatesTracker.fork = fork
    answer_megatron(torch.cuda, "get_rng_state", get_state)
    answer_megatron(torch.cuda, "set_rng_state", set_state)
    answer_megatron(torch.cuda, "manual_seed", torch.manual_seed)


class _NoStream:
    """Stands for a CUDA stream and for its events: all work is done when it is issued."""

    def record_event(self, event: Any = None) -> _NoStream:
        return self

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = wait = record = synchronize = _nothing

    def query(self) -> bool:
        return True


NO_STREAM = _NoStream()


def _use_no_streams() -> None:
    """The alltoall dispatcher, overlapped shared experts, and the schedule that overlaps
    micro-batches make streams and events of their own; the latter marks ranges for a profiler.
    """
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    SharedExpertMLP.stream = NO_STREAM
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = NO_STREAM
    for name in ("current_stream", "default_stream"):
        answer_megatron(torch.cuda, name, lambda *args: NO_STREAM)
    answer_megatron(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for made in (torch.cuda.Stream, torch.cuda.Event):
        answer_megatron(made, "__new__", lambda *args, **kwargs: NO_STREAM)
    answer_megatron(torch.Tensor, "record_stream", lambda tensor, stream: None)
    for name in ("range_push", "range_pop"):
        answer_megatron(torch.cuda.nvtx, name, lambda *args: None)
    answer_megatron(torch.cuda.nvtx, "range", lambda *args: contextlib.nullcontext())


def _pass_splits_as_numpy() -> None:
    """Split sizes become numpy arrays only on their way from the GPU; collectives need that."""
    from megatron.core.transformer.moe import token_dispatcher

    move_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu

    def move_or_convert(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return move_to_cpu(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move_or_convert


def _run_fused_functions_eagerly() -> None:
    """Functions under torch.compile would need a C++ compiler and seconds per rank at first use."""
    from megatron.core import jit

    jit.disable_jit_fuser()
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("megatron.core."):
            continue
        owners = [module, *(v for v in vars(module).values() if isinstance(v, type))]
        for owner in owners:
            for name, value in list(vars(owner).items()):
                if isinstance(value, types.FunctionType):
                    original = getattr(value, "_torchdynamo_orig_callable", None)
                    if original is not None:
                        setattr(owner, name, original)


def answer_megatron(
    owner: Any,
    name: str,
    answer: Callable[..., Any],
    *,
    callers: str | tuple[str, ...] = "megatron.",
) -> None:
    """Makes owner.name() give `answer` to callers inside Megatron, and the usual to all others.

    Args:
        owner: a module or a class.
        name: of a function of it.
        answer: called instead.
        callers: modules whose names begin so, or with one of these, are the callers meant.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def by_caller(*args: Any, **kwargs: Any) -> Any:
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals is globals():  # another answer around this one
            frame = frame.f_back
        caller = frame.f_globals.get("__name__", "") if frame is not None else ""
        chosen = answer if caller.startswith(callers) else original
        return chosen(*args, **kwargs)

    setattr(owner, name, by_caller)


def _replace_constants(module_name: str, qualified_name: str) -> None:
    """Replaces the CUDA names among the constants of a function or method of Megatron-Core."""
    try:
        function: Any = importlib.import_module(f"megatron.core.{module_name}")
        for name in qualified_name.split("."):
            function = inspect.getattr_static(function, name)
    except (ImportError, AttributeError):
        logging.getLogger(__name__).debug("no %s in %s", qualified_name, module_name)
        return
    use_cpu_constants(getattr(function, "__func__", function))


def use_cpu_constants(function: Any) -> None:
    """Replaces the CUDA names among the constants of a function, decorated or not."""
    function = inspect.unwrap(function)
    function.__code__ = _convert_constant(function.__code__)


def _convert_constant(value: Any) -> Any:
    """The constant with CUDA names replaced, in code objects and tuples at any depth."""
    if isinstance(value, str):
        return _CPU_CONSTANTS.get(value, value)
    if isinstance(value, tuple):
        return tuple(map(_convert_constant, value))
    if isinstance(value, types.CodeType):
        return value.replace(co_consts=tuple(map(_convert_constant, value.co_consts)))
    return value
