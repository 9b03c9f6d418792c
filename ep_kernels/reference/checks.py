"""Argument checks of the reference Buffer. Every message names the argument and its value."""

from __future__ import annotations

from typing import Any

import torch

from ep_kernels.config import Layout
from ep_kernels.errors import EPConfigError

ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCALE_DTYPES = (torch.float32, torch.int32)
WEIGHT_DTYPES = (torch.float32, torch.float64)
ROW_BYTES_MULTIPLE = 16


def check(is_right: bool, message: str) -> None:
    if not is_right:
        raise EPConfigError(message)


def check_tensor(
    name: str, value: Any, *, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> torch.Tensor:
    """Checks a contiguous CPU tensor of one of `dtypes`; None in `shape` admits any size."""
    if not isinstance(value, torch.Tensor):
        raise EPConfigError(f"{name}: expected a tensor, got {_describe(value)}")
    check(value.device.type == "cpu", f"{name}: is on {value.device}, this buffer is on cpu")
    wanted = " or ".join(str(dtype) for dtype in dtypes)
    check(value.dtype in dtypes, f"{name}: dtype {value.dtype} is unsupported, expected {wanted}")
    is_right_shape = value.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, value.shape)
    )
    wanted_shape = ["any" if want is None else want for want in shape]
    check(is_right_shape, f"{name}: shape {list(value.shape)}, expected {wanted_shape}")
    check(
        value.is_contiguous(),
        f"{name}: not contiguous, strides {list(value.stride())} of shape {list(value.shape)}",
    )
    return value


def check_stats(recv: Any, wait: Any, *, num_local_experts: int, num_ranks: int) -> None:
    """cumulative_recv_stats and wait_recv_cost_stats; None where there are none."""
    if recv is not None:
        dtypes, shape = (torch.int32, torch.int64), (num_local_experts,)
        check_tensor("cumulative_recv_stats", recv, dtypes=dtypes, shape=shape)
    if wait is not None:
        check_tensor("wait_recv_cost_stats", wait, dtypes=(torch.int64,), shape=(num_ranks,))


def check_row_bytes(name: str, x: torch.Tensor) -> None:
    row_bytes = x.shape[1] * x.element_size()
    check(
        row_bytes > 0 and row_bytes % ROW_BYTES_MULTIPLE == 0,
        f"{name}: hidden={x.shape[1]} of {x.dtype} makes rows of {row_bytes} bytes, expected a "
        f"positive multiple of {ROW_BYTES_MULTIPLE}",
    )


def check_dispatch_rows(x: Any, num_tokens: int | None) -> None:
    """x of dispatch: rows, or a pair of fp8 rows and scales. `num_tokens` None admits any T."""
    if not isinstance(x, tuple):
        check_tensor("x", x, dtypes=ROW_DTYPES, shape=(num_tokens, None))
        check_row_bytes("x", x)
        return
    check(len(x) == 2, f"x: a tuple of {len(x)}, expected (fp8 rows, scales)")
    data = check_tensor("x[0]", x[0], dtypes=(torch.float8_e4m3fn,), shape=(num_tokens, None))
    check_row_bytes("x[0]", data)
    scales = check_tensor("x[1]", x[1], dtypes=SCALE_DTYPES, shape=(len(data), None))
    check(scales.shape[1] > 0, f"x[1]: shape {list(scales.shape)} has no scales")


def check_topk_idx(topk_idx: Any, num_tokens: int | None, num_experts: int) -> None:
    check_tensor("topk_idx", topk_idx, dtypes=(torch.int64,), shape=(num_tokens, None))
    num_topk = topk_idx.shape[1]
    check(
        1 <= num_topk <= num_experts,
        f"topk_idx: num_topk={num_topk} is outside [1, num_experts={num_experts}]",
    )
    outside = torch.nonzero((topk_idx < -1) | (topk_idx >= num_experts))
    if len(outside):
        token, k = outside[0].tolist()
        value = int(topk_idx[token, k])
        raise EPConfigError(
            f"topk_idx[{token}, {k}]={value} is outside [-1, num_experts={num_experts})"
        )
    ordered = topk_idx.sort(dim=1).values
    twice = torch.nonzero((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
    if len(twice):
        token, k = twice[0].tolist()
        raise EPConfigError(f"topk_idx[{token}] chooses expert {int(ordered[token, k])} twice")


def check_weights(topk_weights: Any, shape: tuple[int, ...]) -> None:
    if topk_weights is not None:
        check_tensor("topk_weights", topk_weights, dtypes=WEIGHT_DTYPES, shape=shape)


def check_bias(bias: Any, x: torch.Tensor, num_tokens: int) -> None:
    if isinstance(bias, tuple):
        check(len(bias) == 2, f"bias: a tuple of {len(bias)}, expected one tensor or a pair")
        named = [("bias[0]", bias[0]), ("bias[1]", bias[1])]
    else:
        named = [("bias", bias)] if bias is not None else []
    for name, value in named:
        check_tensor(name, value, dtypes=(x.dtype,), shape=(num_tokens, x.shape[1]))


def check_int(name: str, value: Any, minimum: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    check(is_int, f"{name}={value!r}: expected an int")
    check(value >= minimum, f"{name}={value} is less than {minimum}")


def check_layout(layout: Any) -> None:
    check(isinstance(layout, Layout), f"layout={layout!r}: expected a Layout")


def _describe(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r}"
