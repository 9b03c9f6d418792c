"""Work on rows over several nodes, on a GPU, seen through its C interface
(`csrc/bindings/lane_cuda_api.h`)."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p

from ep_kernels._native import CombineArgs, DispatchArgs, ErrorRecord, Signatures, load_library
from ep_kernels._native_cuda import CUDA_LIBRARY
from ep_kernels._native_lane import LaneMergeArgs, LanePackArgs, LaneSums


class CudaLaneConfig(Structure):
    _fields_ = [
        ("expert_rank", c_void_p),
        ("num_experts", c_int32),
        ("rank", c_int32),
        ("num_local_ranks", c_int32),
    ]


MIRRORS = (CudaLaneConfig, LanePackArgs, LaneSums, LaneMergeArgs)

_ERROR, _OUT = POINTER(ErrorRecord), POINTER(c_void_p)
_DISPATCH, _COMBINE = POINTER(DispatchArgs), POINTER(CombineArgs)
_SIGNATURES: Signatures = {
    "ep_cuda_lane_abi_sizes": (None, [POINTER(c_int32)]),
    "ep_cuda_lane_create": (c_int32, [c_void_p, POINTER(CudaLaneConfig), _OUT, _ERROR]),
    "ep_cuda_lane_delete": (None, [c_void_p]),
    "ep_cuda_lane_pack": (c_int32, [c_void_p, POINTER(LanePackArgs), c_void_p, _ERROR]),
    "ep_cuda_lane_send_rows": (c_int32, [c_void_p, _DISPATCH, c_void_p, c_void_p, _ERROR]),
    "ep_cuda_lane_fill_padding": (c_int32, [c_void_p, _DISPATCH, c_void_p, _ERROR]),
    "ep_cuda_lane_stage_rows": (c_int32, [c_void_p, _COMBINE, c_void_p, _ERROR]),
    "ep_cuda_lane_reduce_rows": (c_int32, [c_void_p, _COMBINE, c_void_p, c_void_p, _ERROR]),
    "ep_cuda_lane_merge": (c_int32, [c_void_p, POINTER(LaneMergeArgs), c_void_p, _ERROR]),
    "ep_cuda_lane_copy": (c_int32, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p, _ERROR]),
}


@functools.cache
def cuda_lane_library() -> ctypes.CDLL:
    """The CUDA core again, with these functions. Raises EPDeviceError as load_library()."""
    return load_library(CUDA_LIBRARY, _SIGNATURES, "ep_cuda_lane_abi_sizes", MIRRORS)
