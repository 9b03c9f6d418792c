"""A CUDA buffer for tests on CPU tensors: arguments go to the device, results come back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import torch

STATISTICS = ("cumulative_recv_stats", "wait_recv_cost_stats")
"""Options that a call adds to."""


def on_host(value):
    """A tensor, None, or a result with its tensors on the CPU."""
    if not is_dataclass(value):
        return move(value, "cpu")
    moved = {field.name: move(getattr(value, field.name), "cpu") for field in fields(value)}
    return replace(value, **moved)


def move(value, device):
    """Tensors, also in sequences; what lies inside handles is the buffer's."""
    if isinstance(value, torch.Tensor) and not value.is_meta:  # those are wrong on purpose
        if value.is_contiguous():
            return value.to(device)
        # to() would make it so
        there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return there.copy_(value)
    if isinstance(value, (tuple, list)):
        return type(value)(move(one, device) for one in value)
    return value


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


class _HostEvent:
    """The event of a low-latency call, which brings the results to the host."""

    def __init__(self, event, copies):
        self._event, self._copies = event, copies

    def __getattr__(self, name):
        return getattr(self._event, name)

    def wait(self):
        self._event.wait()
        for host, there in self._copies:
            host.copy_(there)


class _HostHook:
    def __init__(self, hook, event):
        self._hook, self._event = hook, event

    def __call__(self):
        self._hook()
        self._event.wait()


def _to_host(result, given, *, is_async):
    """The result of a low-latency call with tensors on the host, filled when they are there.

    `given`: pairs of tensors of the caller and their copies on the device.
    """
    copies, fields_here = list(given), {}
    for f in fields(result):
        there = getattr(result, f.name)
        if not _is_tensor(there):
            continue
        host = next((mine for mine, copy in given if copy is there), None)
        if host is None:
            host = torch.empty_strided(there.shape, there.stride(), dtype=there.dtype)
            copies.append((host, there))
        fields_here[f.name] = host
    event = _HostEvent(result.event, copies)
    fields_here["event"] = event
    if result.hook is not None:
        fields_here["hook"] = _HostHook(result.hook, event)
    elif not is_async:
        event.wait()
    return replace(result, **fields_here)


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

    def low_latency_dispatch(self, x, topk_idx, **options):
        return self._low_latency(self.unwrapped.low_latency_dispatch, (x, topk_idx), options)

    def low_latency_combine(self, *arguments, **options):
        return self._low_latency(self.unwrapped.low_latency_combine, arguments, options)

    def _low_latency(self, method, arguments, options):
        device = self.unwrapped.device
        moved = {name: move(value, device) for name, value in options.items()}
        result = method(*(move(one, device) for one in arguments), **moved)
        given = [(value, moved[name]) for name, value in options.items() if _is_tensor(value)]
        return _to_host(result, given, is_async=options.get("async_op", False))

    def _call(self, method, arguments, options):
        device = self.device
        moved = {name: move(value, device) for name, value in options.items()}
        result = method(*(move(one, device) for one in arguments), **moved)
        if self._keeps_results:
            return result
        result.event.wait()
        for name, value in options.items():
            if name in STATISTICS and value is not None:
                value.copy_(moved[name])
        return on_host(result)
