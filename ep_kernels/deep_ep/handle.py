"""The routing of a dispatch in DeepEP's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import ep_kernels


class DispatchHandle(Sequence[torch.Tensor]):
    """What dispatch() gives to combine(); a sequence of one tensor.

    [0] is the int32 [R, R] matrix whose entry [i][j] is the number of rows that rank j received
    from the ranks up to and including i: the rows of rank i on this rank r are
    [i - 1][r] to [i][r] (from 0 for i = 0). To be read after the event of the dispatch.

    Attributes:
        buffer, handle: of ep_kernels.
    """

    def __init__(self, buffer: ep_kernels.Buffer, handle: ep_kernels.DispatchHandle) -> None:
        self.buffer, self.handle = buffer, handle

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        if index not in (0, -1):
            raise IndexError(f"a DispatchHandle has one element, {index} was asked for")
        return self.handle.rank_counts.cumsum(dim=0).to(torch.int32)
