"""Buffers by number: operators of torch.library take tensors and numbers, and name a buffer so."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

from ep_kernels.errors import EPConfigError

if TYPE_CHECKING:
    from ep_kernels.buffer import Buffer

_buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
_ids = itertools.count()


def register(buffer: Buffer) -> int:
    """A number for the buffer, never used again in this process. Does not keep it alive."""
    buffer_id = next(_ids)
    _buffers[buffer_id] = buffer
    return buffer_id


def find(buffer_id: int) -> Buffer:
    """The buffer with that number.

    Raises:
        EPConfigError: there is none, or none any more.
    """
    buffer = _buffers.get(buffer_id)
    if buffer is None:
        raise EPConfigError(f"buffer_id={buffer_id}: no such buffer, or it is gone; keep it alive")
    return buffer
