"""The low-latency part of the compiled cores, as `_native.py` (`csrc/bindings/ll_api.h`,
`csrc/bindings/ll_cuda_api.h`).
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_uint64, c_void_p

from ep_kernels._native import CPU_LIBRARY, ErrorRecord, Signatures, load_library
from ep_kernels._native_cuda import CUDA_LIBRARY

RECEIVE_NOW, RECEIVE_ASYNC, RECEIVE_LATER = 0, 1, 2


class LlSizes(Structure):
    _fields_ = [
        ("num_tokens", c_int64),
        ("num_max_tokens_per_rank", c_int64),
        ("hidden", c_int64),
        ("num_topk", c_int32),
        ("format", c_int32),
        ("num_threads", c_int32),
        ("unused", c_int32),
    ]


class LlDispatchArgs(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("topk_idx", c_void_p),
        ("experts", c_void_p),
        ("rows", c_void_p),
        ("recv_count", c_void_p),
        ("recv_rank_counts", c_void_p),
        ("missing", c_void_p),
        ("cumulative_recv_stats", c_void_p),
        ("wait_recv_cost_stats", c_void_p),
        ("cumulative_stats_bytes", c_int64),
        ("sizes", LlSizes),
    ]


class LlCombineArgs(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("topk_idx", c_void_p),
        ("topk_weights", c_void_p),
        ("experts", c_void_p),
        ("rows", c_void_p),
        ("out", c_void_p),
        ("missing", c_void_p),
        ("wait_recv_cost_stats", c_void_p),
        ("dispatch", c_uint64),
        ("wire", c_int32),
        ("is_zero_copy", c_int32),
    ]


_ERROR = POINTER(ErrorRecord)
_OUT = POINTER(c_void_p)
_NUMBER = POINTER(c_uint64)
_SIGNATURES: Signatures = {
    "ep_ll_abi_sizes": (None, [POINTER(c_int32)]),
    "ep_ll_region_bytes": (c_int64, [POINTER(LlSizes), c_int32, c_int32, c_int32]),
    "ep_ll_half_offsets": (None, [POINTER(LlSizes), c_int32, c_int32, POINTER(c_int64)]),
    "ep_ll_check_dispatch": (c_int32, [POINTER(LlDispatchArgs), c_int32, _ERROR]),
    "ep_ll_check_combine": (c_int32, [POINTER(LlCombineArgs), POINTER(LlSizes), _ERROR]),
    "ep_ll_check_agreed": (c_int32, [c_int32, c_int32, c_int64, c_int32, c_int64, _ERROR]),
    "ep_ll_create": (c_int32, [c_void_p, c_int64, c_int64, c_int32, _OUT, _ERROR]),
    "ep_ll_delete": (None, [c_void_p]),
    "ep_ll_dispatch": (
        c_int32,
        [c_void_p, POINTER(LlDispatchArgs), c_int32, _NUMBER, POINTER(c_int64), _OUT, _ERROR],
    ),
    "ep_ll_combine": (
        c_int32,
        [c_void_p, POINTER(LlCombineArgs), c_int32, _NUMBER, _OUT, _ERROR],
    ),
    "ep_ll_receive": (c_int32, [c_void_p, c_uint64, _ERROR]),
    "ep_ll_release": (None, [c_void_p, c_uint64]),
    "ep_ll_barrier": (c_int32, [c_void_p, _ERROR]),
    "ep_ll_refuse": (c_int32, [c_void_p, c_char_p, _ERROR]),
    "ep_ll_mask": (c_int32, [c_void_p, c_int32, _ERROR]),
    "ep_ll_unmask": (c_int32, [c_void_p, c_int32, _ERROR]),
    "ep_ll_query_mask": (c_int32, [c_void_p, c_void_p, _ERROR]),
}


# Moments of a low-latency call on a GPU, as LlStamp in csrc/cuda/ll_group.h explains them.
LL_STAMPS = (
    *("begin", "posted", "placed", "agreed", "resolved", "sent"),
    *("written", "said", "receiving", "arrived", "summed", "end"),
)
NUM_STAMPED = 64

_STREAM = c_void_p
_HOST_NUMBER = POINTER(c_int64)
CUDA_SIGNATURES: Signatures = {
    "ep_cuda_ll_abi_sizes": (None, [POINTER(c_int32)]),
    "ep_cuda_ll_create": (c_int32, [c_void_p, c_int64, c_int64, c_int32, _OUT, _ERROR]),
    "ep_cuda_ll_delete": (None, [c_void_p]),
    "ep_cuda_ll_dispatch": (
        c_int32,
        [
            *(c_void_p, POINTER(LlDispatchArgs), c_int32, _STREAM),
            *(_HOST_NUMBER, POINTER(c_int64), _ERROR),
        ],
    ),
    "ep_cuda_ll_combine": (
        c_int32,
        [c_void_p, POINTER(LlCombineArgs), c_int32, _STREAM, _HOST_NUMBER, _ERROR],
    ),
    "ep_cuda_ll_receive": (c_int32, [c_void_p, c_int64, _STREAM, _ERROR]),
    "ep_cuda_ll_release": (None, [c_void_p, c_int64]),
    "ep_cuda_ll_barrier": (c_int32, [c_void_p, _STREAM, _ERROR]),
    "ep_cuda_ll_refuse": (c_int32, [c_void_p, c_char_p, _STREAM, _ERROR]),
    "ep_cuda_ll_mask": (c_int32, [c_void_p, c_int32, _STREAM, _ERROR]),
    "ep_cuda_ll_unmask": (c_int32, [c_void_p, c_int32, _STREAM, _ERROR]),
    "ep_cuda_ll_query_mask": (c_int32, [c_void_p, c_void_p, _STREAM, _ERROR]),
    "ep_cuda_ll_stamps": (c_int32, [c_void_p, c_void_p, _STREAM, _ERROR]),
    "ep_cuda_ll_is_finished": (c_int32, [c_void_p, c_int64]),
    "ep_cuda_ll_wait": (c_int32, [c_void_p, c_int64, _ERROR]),
    "ep_cuda_ll_check": (c_int32, [c_void_p, c_int64, _ERROR]),
    "ep_cuda_ll_make_stream_wait": (c_int32, [c_void_p, c_int64, _STREAM, _ERROR]),
}
LL_MIRRORS = (LlSizes, LlDispatchArgs, LlCombineArgs)


@functools.cache
def ll_library() -> ctypes.CDLL:
    """Loads the CPU core's low-latency interface. Raises EPDeviceError as load_library()."""
    return load_library(CPU_LIBRARY, _SIGNATURES, "ep_ll_abi_sizes", LL_MIRRORS)


def region_bytes(sizes: LlSizes, num_ranks: int, num_experts: int, num_local_experts: int) -> int:
    """Bytes of a region for calls of these sizes, the same in both cores."""
    num_bytes: int = ll_library().ep_ll_region_bytes(
        ctypes.byref(sizes), num_ranks, num_experts, num_local_experts
    )
    return num_bytes


def half_offsets(sizes: LlSizes, num_ranks: int, num_local_experts: int) -> tuple[int, int, int]:
    """Where a half has its rows, their scales, and the rows for combine, the same in both cores."""
    offsets = (ctypes.c_int64 * 3)()
    ll_library().ep_ll_half_offsets(ctypes.byref(sizes), num_ranks, num_local_experts, offsets)
    return offsets[0], offsets[1], offsets[2]


@functools.cache
def cuda_ll_library() -> ctypes.CDLL:
    """The same of the CUDA core."""
    return load_library(CUDA_LIBRARY, CUDA_SIGNATURES, "ep_cuda_ll_abi_sizes", LL_MIRRORS)
