"""Buffers by name: operators of torch.library take tensors, numbers and strings, no objects.

A string, since torch.compile takes a number that changes for a size.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

from ep_kernels.errors import EPConfigError

if TYPE_CHECKING:
    from ep_kernels.buffer import Buffer

_buffers: weakref.WeakValueDictionary[str, Buffer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(buffer: Buffer) -> str:
    """A name for the buffer, never used again in this process. Does not keep it alive."""
    name = f"buffer{next(_numbers)}"
    _buffers[name] = buffer
    return name


def find(name: str) -> Buffer:
    """The buffer of that name.

    Raises:
        EPConfigError: there is none, or none any more.
    """
    buffer = _buffers.get(name)
    if buffer is None:
        raise EPConfigError(f"buffer {name!r}: no such buffer, or it is gone; keep it alive")
    return buffer
