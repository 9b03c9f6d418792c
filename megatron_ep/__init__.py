"""ep_kernels under a Megatron-Core model.

register()               makes moe_token_dispatcher_type="deepep" known to Megatron-Core
unregister()             takes that back
configure()              options of layers and of the buffers that they make
capture_layer()          a MoE layer as CUDA graphs
reset_buffers()          ends these buffers, before their process groups end
DeepEPTokenDispatcher    the dispatcher
dispatch, combine        the two transfers with gradients, without Megatron

Nothing is imported before it is used: neither ep_kernels nor megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ep.autograd import combine, dispatch
    from megatron_ep.buffers import Options, configure, reset_buffers
    from megatron_ep.graphs import capture_layer
    from megatron_ep.install import register, unregister
    from megatron_ep.token_dispatcher import DeepEPTokenDispatcher

_MODULES = {
    "DeepEPTokenDispatcher": "token_dispatcher",
    "Options": "buffers",
    "capture_layer": "graphs",
    "combine": "autograd",
    "configure": "buffers",
    "dispatch": "autograd",
    "register": "install",
    "reset_buffers": "buffers",
    "unregister": "install",
}

__all__ = [
    "DeepEPTokenDispatcher",
    "Options",
    "capture_layer",
    "combine",
    "configure",
    "dispatch",
    "register",
    "reset_buffers",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
