"""The call interface of DeepEP V1 on ep_kernels: programs written for it run unchanged.

install()                                     makes `import deep_ep` mean this package
python -m ep_kernels.deep_ep SCRIPT ARGS...   the same for a script

docs/deep-ep-compat.md tells what each call becomes, and where it differs from DeepEP.
"""

import torch

from ep_kernels.deep_ep import utils
from ep_kernels.deep_ep.buffer import Buffer
from ep_kernels.deep_ep.config import Config
from ep_kernels.deep_ep.importing import install, install_if_missing, uninstall
from ep_kernels.deep_ep.utils import EventHandle, EventOverlap

topk_idx_t = torch.int64

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "install",
    "install_if_missing",
    "topk_idx_t",
    "uninstall",
    "utils",
]
