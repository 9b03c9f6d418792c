"""What the training programs of Megatron-LM (package megatron.training) need on CPU ranks, beside
what cpu_compat.py does for Megatron-Core.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from megatron_ep import cpu_compat

_CALLERS = ("megatron.training", "__main__")

_ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "set_device": lambda device: None,
    "current_device": lambda: torch.device("cpu"),
    "synchronize": lambda *args: None,
    "get_device_capability": lambda *args: (0, 0),
    "Stream": lambda *args, **kwargs: cpu_compat.NO_STREAM,
}


def enable_cpu_training() -> bool:
    """enable_cpu(), and the same for megatron.training if it can be imported.

    Returns:
        Whether Megatron is set up for the CPU now.
    """
    if torch.cuda.is_available():
        return False
    with _standing_in_for_triton():
        cpu_compat.enable_cpu()
        if importlib.util.find_spec("megatron.training") is None:
            return True
        importlib.import_module("megatron.training")
    if kernels := sys.modules.get("megatron.legacy.fused_kernels"):
        kernels.load = lambda args: None  # type: ignore[attr-defined]  # compiles CUDA code
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron."):
            _use_cpu(module)
    for name, answer in _ANSWERS.items():
        cpu_compat.answer_megatron(torch.cuda, name, answer, callers=_CALLERS)
    for owner in (torch.nn.Module, torch.Tensor):
        cpu_compat.answer_megatron(owner, "cuda", lambda one, *args, **kw: one, callers=_CALLERS)
    return True


@contextlib.contextmanager
def _standing_in_for_triton() -> Iterator[None]:
    """Megatron imports kernels written in triton, some of them without asking whether it is there.
    On the CPU nobody calls them. Inside of the block Megatron, and nobody else, can import them;
    behind it, it knows that triton is missing.
    """
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    stand_in, original = mock.MagicMock(__version__="0.0"), builtins.__import__

    def import_by_caller(name: str, globals: Any = None, *args: Any, **kwargs: Any) -> Any:
        caller = (globals or {}).get("__name__", "")
        if name.split(".")[0] == "triton" and caller.startswith("megatron."):
            return stand_in
        return original(name, globals, *args, **kwargs)

    with mock.patch.object(builtins, "__import__", import_by_caller):
        yield
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and getattr(module, "HAVE_TRITON", False):
            module.HAVE_TRITON = False  # type: ignore[attr-defined]


def _use_cpu(owner: Any) -> None:
    """Functions and methods that are defined in a module name "cpu" where they named "cuda"."""
    module_name = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
    for value in list(vars(owner).values()):
        value = getattr(value, "__func__", value)
        if getattr(value, "__module__", None) != module_name:
            continue
        if isinstance(value, type) and isinstance(owner, types.ModuleType):
            _use_cpu(value)
        elif isinstance(value, types.FunctionType):
            cpu_compat.use_cpu_constants(value)
