"""One GEMM for all experts of a rank, over rows that are grouped by expert.

    forward             out = x weight^T        on a GPU one kernel for all groups, and a small one
    gradient of x       grad weight             before it, where torch has them (has_kernel()); a
    gradient of weight  grad^T x                loop over groups elsewhere

Where groups end is a tensor on the device of the rows. The kernel reads it there, so that the host
neither knows nor waits for it; the loop has the host read it.

Symbols:
    N  rows     G  groups     I  width of the input     O  width of the output
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

ROW_BYTES = 16
"""Rows on both sides of the kernel are multiples of it."""

_KERNEL_CAPABILITIES = (9, 10)
"""Major versions of GPUs for which torch has a kernel; on others it loops, as we do."""


def grouped_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    *,
    adds_to_main_grad: bool = False,
) -> torch.Tensor:
    """Multiplies the rows of each group by the group's weight, with gradients.

    Args:
        x: [N, I], group g is the rows from ends[g - 1] to ends[g].
        weight: [G, O, I].
        ends: [G] int32 on the device of x, ascending, at most N.
        adds_to_main_grad: the gradient of the weight is added to weight.main_grad, where there is
            one, as Megatron's gradient_accumulation_fusion has it; weight.grad is then of no use.

    Returns:
        [N, O]. Rows from ends[-1] on are unspecified, here as in the gradient of x, and have no
        part in the gradient of the weight.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Example:
        >>> x, weight = torch.ones(3, 2), torch.stack([torch.eye(2), 5 * torch.eye(2)])
        >>> grouped_mm(x, weight, torch.tensor([1, 3], dtype=torch.int32)).tolist()
        [[1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)} are not "
            "[N, I] and [G, O, I]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x has dtype {x.dtype}, weight {weight.dtype}")
    if ends.shape != weight.shape[:1] or ends.dtype != torch.int32 or ends.device != x.device:
        raise ValueError(
            f"ends of shape {tuple(ends.shape)}, {ends.dtype} on {ends.device}: expected "
            f"[{len(weight)}], torch.int32 on {x.device}"
        )
    out: torch.Tensor = _GroupedMM.apply(x.contiguous(), weight, ends, adds_to_main_grad)
    return out


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the GEMM of all groups is one call of torch that the host need not know groups for.

    On the CPU: whether torch has that call.
    """
    if not hasattr(torch, "_grouped_mm"):
        return False
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return dtype == torch.bfloat16 and major in _KERNEL_CAPABILITIES
    rows = torch.zeros(1, ROW_BYTES, dtype=dtype)
    try:
        _call_kernel(rows, rows.new_zeros(1, ROW_BYTES, ROW_BYTES), torch.ones(1).int())
    except (RuntimeError, NotImplementedError):
        return False
    return True


class LateWeightGradients:
    """Inside of the block the backward of grouped_mm() leaves gradients of weights out; compute()
    makes them. They are half of its work, and nobody waits for them as long as training lasts:
    the gradients of rows can be sent before.

    Example:
        >>> late = LateWeightGradients()
        >>> with late:
        ...     (rows_grad,) = torch.autograd.grad(out, [rows], grad)
        >>> send(rows_grad)
        >>> weight_grads = late.compute([weight])
    """

    _active: ClassVar[LateWeightGradients | None] = None  # of the process: backwards have threads

    def __init__(self) -> None:
        self._left: list[tuple[Any, Callable[[], torch.Tensor | None]]] = []

    @staticmethod
    def active() -> LateWeightGradients | None:
        """The one whose block this is."""
        return LateWeightGradients._active

    def __enter__(self) -> LateWeightGradients:
        assert LateWeightGradients._active is None, "blocks do not nest"
        LateWeightGradients._active = self
        return self

    def __exit__(self, *exc_info: object) -> None:
        LateWeightGradients._active = None

    def leave(self, weight: Any, compute: Callable[[], torch.Tensor | None]) -> None:
        """Notes how the gradient of a weight is computed."""
        self._left.append((weight, compute))

    def compute(self, parameters: Sequence[Any]) -> list[torch.Tensor | None]:
        """The gradients that were left out, once, by parameter; None where there is none."""
        grads: list[torch.Tensor | None] = [None] * len(parameters)
        left, self._left = self._left, []
        for weight, compute in left:
            (index,) = (i for i, parameter in enumerate(parameters) if parameter is weight)
            grad, before = compute(), grads[index]
            grads[index] = grad if before is None or grad is None else before + grad
        return grads


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        ends: torch.Tensor,
        adds_to_main_grad: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.weight, ctx.adds_to_main_grad = weight, adds_to_main_grad
        return _rows_times(x, weight.transpose(1, 2), ends)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _rows_times(grad, weight, ends) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        parameter = ctx.weight if ctx.adds_to_main_grad else None
        if late := LateWeightGradients.active():
            compute = functools.partial(_weight_gradient, grad, x, ends, parameter)
            late.leave(ctx.weight, compute)
            return grad_x, None, None, None
        return grad_x, _weight_gradient(grad, x, ends, parameter), None, None


def _weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, parameter: Any
) -> torch.Tensor:
    """[G, O, I]; what autograd gets in its place, if Megatron accumulates in `parameter`."""
    of_weight = _sums_of_products(grad, x, ends)
    return of_weight if parameter is None else _add_to_main_grad(parameter, of_weight)


def _rows_times(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[N, A] and [G, A, B] -> [N, B]."""
    num_rows, width = len(x), matrices.shape[2]
    if num_rows == 0:
        return x.new_empty(0, width)
    if _takes_kernel(x, x.shape[1], width):
        return _call_kernel(x, matrices, ends)
    out = x.new_empty(num_rows, width)
    for group, (begin, end) in enumerate(_ranges(ends)):
        torch.mm(x[begin:end], matrices[group], out=out[begin:end])
    return out


def _sums_of_products(one: torch.Tensor, other: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[N, A] and [N, B] -> [G, A, B], of each group the sum over its rows."""
    shape = len(ends), one.shape[1], other.shape[1]
    if len(one) == 0:
        return one.new_zeros(shape)
    if _takes_kernel(one, *shape[1:]):
        return _call_kernel(one.t(), other, ends)
    out = one.new_empty(shape)
    for group, (begin, end) in enumerate(_ranges(ends)):
        torch.mm(one[begin:end].t(), other[begin:end], out=out[group])
    return out


def _takes_kernel(rows: torch.Tensor, *widths: int) -> bool:
    is_aligned = all(width * rows.element_size() % ROW_BYTES == 0 for width in widths)
    return is_aligned and has_kernel(rows.device, rows.dtype)


def _call_kernel(x: torch.Tensor, other: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm
    out: torch.Tensor = function(x, other, offs=ends)
    return out


def _ranges(ends: torch.Tensor) -> list[tuple[int, int]]:
    bounds = [0, *ends.tolist()]
    return list(zip(bounds, bounds[1:]))


def _add_to_main_grad(parameter: Any, grad: torch.Tensor) -> torch.Tensor:
    """Adds a gradient where Megatron accumulates, and returns what autograd gets in its place."""
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is None:
        return grad
    main_grad.add_(grad)
    parameter.grad_added_to_main_grad = True
    if getattr(parameter, "zero_out_wgrad", False):
        grad.zero_()
    return grad
