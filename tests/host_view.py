"""A CUDA buffer for tests on CPU tensors: arguments go to the device, results come back."""

from __future__ import annotations

from dataclasses import fields, replace

import torch


def _move(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_move(one, device) for one in value)
    return value


class HostView:
    """Everything else is the buffer's own."""

    def __init__(self, buffer):
        self._buffer = buffer

    def __getattr__(self, name):
        return getattr(self._buffer, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._buffer.destroy()

    def get_dispatch_layout(self, topk_idx):
        return self._back(self._buffer.get_dispatch_layout(topk_idx.to(self._buffer.device)))

    def dispatch(self, x, topk_idx=None, topk_weights=None, **options):
        return self._call(self._buffer.dispatch, (x, topk_idx, topk_weights), options)

    def combine(self, x, handle, **options):
        return self._call(self._buffer.combine, (x, handle), options)

    def _call(self, method, arguments, options):
        device = self._buffer.device
        options = {name: _move(value, device) for name, value in options.items()}
        result = method(*(_move(one, device) for one in arguments), **options)
        result.event.wait()
        return self._back(result)

    def _back(self, result):
        moved = {f.name: _move(getattr(result, f.name), "cpu") for f in fields(result)}
        return replace(result, **moved)
