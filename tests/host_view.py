"""A CUDA buffer for tests on CPU tensors: arguments go to the device, results come back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import torch


def on_host(value):
    """A tensor, None, or a result with its tensors on the CPU."""
    if not is_dataclass(value):
        return move(value, "cpu")
    moved = {field.name: move(getattr(value, field.name), "cpu") for field in fields(value)}
    return replace(value, **moved)


def move(value, device):
    """Tensors, also in sequences; what lies inside handles is the buffer's."""
    if isinstance(value, torch.Tensor) and not value.is_meta:  # those are wrong on purpose
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(move(one, device) for one in value)
    return value


class HostView:
    """Everything else is the buffer's own.

    Args:
        buffer: on a GPU.
        keeps_results: results stay on the device, and calls are not waited for.
    """

    def __init__(self, buffer, *, keeps_results=False):
        self.unwrapped, self._keeps_results = buffer, keeps_results

    def __getattr__(self, name):
        return getattr(self.unwrapped, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.unwrapped.destroy()

    def get_dispatch_layout(self, topk_idx):
        return on_host(self.unwrapped.get_dispatch_layout(move(topk_idx, self.device)))

    def dispatch(self, x, topk_idx=None, topk_weights=None, **options):
        return self._call(self.unwrapped.dispatch, (x, topk_idx, topk_weights), options)

    def combine(self, x, handle, **options):
        return self._call(self.unwrapped.combine, (x, handle), options)

    def _call(self, method, arguments, options):
        device = self.device
        options = {name: move(value, device) for name, value in options.items()}
        result = method(*(move(one, device) for one in arguments), **options)
        if self._keeps_results:
            return result
        result.event.wait()
        return on_host(result)
