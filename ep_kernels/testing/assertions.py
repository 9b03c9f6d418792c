"""Comparisons without tolerance."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

NOT_COMPARED = frozenset({"handle", "event"})
"""Fields of a result that carry no data."""

ROW_FIELDS = frozenset({"recv_x", "recv_scales"})
"""Fields of DispatchResult whose rows past the received ones are unspecified."""


def assert_bitwise_equal(
    got: Any, want: Any, *, name: str = "value", num_rows: int | None = None, any_nan: bool = False
) -> None:
    """Checks that two tensors, or two results of tensors, have the same dtype, shape and bytes.

    Bytes, so -0.0 differs from 0.0 and a NaN equals only the same NaN; any dtype, fp8 included.

    Args:
        got: a tensor, None, or a result dataclass (its fields are compared one by one, except the
            handle and the event).
        want: what it should be.
        name: what to call it in the message.
        num_rows: compare `recv_x` and `recv_scales` of a DispatchResult up to this row only: with
            a capacity, the contents of the rows past the received ones are unspecified.
        any_nan: let every NaN equal every NaN. Sums keep being NaN, but which one is unspecified.

    Raises:
        AssertionError: naming the field, the first index that differs, and both values.
    """
    if dataclasses.is_dataclass(want):
        assert type(got) is type(want), f"{name}: type {type(got)}, expected {type(want)}"
        for field in dataclasses.fields(want):
            if field.name in NOT_COMPARED:
                continue
            got_field, want_field = getattr(got, field.name), getattr(want, field.name)
            if num_rows is not None and field.name in ROW_FIELDS and want_field is not None:
                assert got_field.shape == want_field.shape, _shapes(name, got_field, want_field)
                got_field, want_field = got_field[:num_rows], want_field[:num_rows]
            assert_bitwise_equal(
                got_field, want_field, name=f"{name}.{field.name}", any_nan=any_nan
            )
        return
    if want is None or got is None:
        assert got is want, f"{name}: {_brief(got)}, expected {_brief(want)}"
        return
    _assert_tensors_equal(got, want, name, any_nan)


def _assert_tensors_equal(got: torch.Tensor, want: torch.Tensor, name: str, any_nan: bool) -> None:
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, _shapes(name, got, want)
    assert got.device == want.device, f"{name}: on {got.device}, expected {want.device}"
    got_bytes, want_bytes = as_bytes(got), as_bytes(want)
    if torch.equal(got_bytes, want_bytes):
        return
    differs = (got_bytes != want_bytes).any(dim=-1)
    if any_nan:
        differs &= ~(got.isnan() & want.isnan())
        if not differs.any():
            return
    index = tuple(differs.nonzero()[0].tolist())
    raise AssertionError(
        f"{name}: {int(differs.sum())} of {differs.numel()} elements differ, first at "
        f"{list(index)}: {_element(got, got_bytes, index)}, "
        f"expected {_element(want, want_bytes, index)}"
    )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of each element: shape [*tensor.shape, itemsize] uint8.

    Example:
        >>> as_bytes(torch.tensor([-0.0])).tolist()
        [[0, 0, 0, 128]]
    """
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)


def _shapes(name: str, got: torch.Tensor, want: torch.Tensor) -> str:
    return f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"


def _element(tensor: torch.Tensor, tensor_bytes: torch.Tensor, index: tuple[int, ...]) -> str:
    bits = bytes(reversed(tensor_bytes[index].tolist())).hex()
    return f"{tensor[index].item()!r} (0x{bits})"


def _brief(value: Any) -> str:
    return f"tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
