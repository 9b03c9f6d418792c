"""SMs that GEMMs leave free for transfers.

torch's GEMMs on newer GPUs are persistent: as many blocks as there are SMs, each for its share of
the tiles, from the first one's start to the last one's end. Next to a transfer that holds some SMs,
the blocks that find no room start when the others end, and the GEMM takes twice as long; or the
transfer starts when the GEMM ends. GEMMs that are launched for fewer SMs take a little longer, and
both run at once.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

warnings.filterwarnings("ignore", message="Setting the SM carveout")  # that it may be removed


@contextlib.contextmanager
def free_sms(num_sms: int | None) -> Iterator[None]:
    """GEMMs of torch that are launched inside leave so many SMs of the GPU free: grouped ones, and
    those of cuBLAS. None, or a torch that cannot: nothing changes.

    NOTE: a setting of the process, so work that another thread launches meanwhile takes part.
    """
    set_carveout = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if num_sms is None or set_carveout is None:
        yield
        return
    before = torch._C._get_sm_carveout_experimental()
    set_carveout(num_sms)
    try:
        yield
    finally:
        set_carveout(before)
