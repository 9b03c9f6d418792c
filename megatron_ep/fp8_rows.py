"""Rows that travel as fp8: e4m3, with a scale for each group of 128 channels.

Half the bytes of bf16, for a relative error of up to 1/16 in each element (3 bits of mantissa).
Experts get rows of the layer's dtype; gradients travel in it, as if nothing was rounded.
"""

from __future__ import annotations

from typing import Any

import torch

from ep_kernels.reference import fp8_cast

SCALE_GROUP = 128


def check_fp8_hidden(hidden: int) -> None:
    """Raises ValueError unless rows of this size fall into whole groups."""
    if hidden % SCALE_GROUP:
        raise ValueError(
            f"fp8_dispatch=True needs rows of whole groups of {SCALE_GROUP} channels, "
            f"hidden size is {hidden}"
        )


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H] -> [T, H] float8_e4m3fn and [T, H / 128] float32 scales.

    Example:
        >>> rows, scales = quantise(torch.full((1, 128), 7.0))
        >>> rows[0, 0].item(), scales.tolist()
        (448.0, [[0.015625]])
    """
    check_fp8_hidden(x.shape[1])
    return fp8_cast(x)


def received_rows(sent: Any, dtype: torch.dtype) -> torch.Tensor:
    """The rows of a DispatchResult for the experts; fp8 rows are waited for and dequantised.

    Args:
        sent: what Buffer.dispatch() gave.
        dtype: of dequantised rows.
    """
    if sent.recv_scales is None:
        rows: torch.Tensor = sent.recv_x.detach()
        return rows
    sent.event.current_stream_wait()
    groups = sent.recv_x.to(torch.float32).unflatten(1, (-1, SCALE_GROUP))
    # NOTE: rows of padding are zero, their scales may be anything.
    scales = sent.recv_scales.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return (groups * scales.unsqueeze(2)).flatten(1).to(dtype)
