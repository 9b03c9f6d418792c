"""The compiled CUDA core, seen through its C interface (`csrc/bindings/cuda_api.h`)."""

from __future__ import annotations

import ctypes
import functools
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_uint8,
    c_uint64,
    c_void_p,
)

from ep_kernels._native import (
    LIB_DIR,
    CombineArgs,
    DispatchArgs,
    ErrorRecord,
    Routing,
    Signatures,
    Sizes,
    load_library,
)

CUDA_LIBRARY = LIB_DIR / "libep_cuda.so"
HANDLE_BYTES = 64

FIRST_CAPTURED = 1 << 40
"""Numbers of calls in graphs begin here, as in `csrc/cuda/buffer.h`."""

STAMPS = ("begin", "agreed", "sized", "offered", "moving", "moved", "done")
"""Moments of a call, as in `csrc/cuda/group.h`."""


class CudaConfig(Structure):
    _fields_ = [
        ("device", c_int32),
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("num_experts", c_int32),
        ("expert_rank", c_void_p),
        ("pool_bytes", c_int64),
        ("timeout_us", c_int64),
        ("low_latency_bytes", c_int64),
    ]


class CallOrder(Structure):
    _fields_ = [
        ("caller", c_void_p),
        ("previous", c_void_p),
        ("is_async", c_int32),
        ("follows_caller", c_int32),
    ]


class ReceivedRows(Structure):
    _fields_ = [
        ("block", c_void_p),
        ("address", c_void_p),
        ("offset", c_int64),
    ]


class Receive(Structure):
    _fields_ = [
        (name, ReceivedRows) for name in ("x", "scales", "topk_idx", "topk_weights", "chain")
    ]


class FreshCounts(Structure):
    _fields_ = [
        ("num_rows", c_int64),
        ("num_recv_tokens_per_expert", c_void_p),
        ("expert_offsets", c_void_p),
    ]


MIRRORS = (
    CallOrder,
    CudaConfig,
    Sizes,
    Routing,
    DispatchArgs,
    CombineArgs,
    Receive,
    FreshCounts,
)

_ERROR, _CALL, _OUT = POINTER(ErrorRecord), POINTER(c_int64), POINTER(c_void_p)
_DISPATCH, _COMBINE, _ORDER = POINTER(DispatchArgs), POINTER(CombineArgs), POINTER(CallOrder)
_SIGNATURES: Signatures = {
    "ep_cuda_abi_sizes": (None, [POINTER(c_int32)]),
    "ep_cuda_buffer_create": (c_int32, [POINTER(CudaConfig), _OUT, POINTER(c_uint8), _ERROR]),
    "ep_cuda_buffer_attach": (c_int32, [c_void_p, c_char_p, c_uint64, _ERROR]),
    "ep_cuda_chains_rows": (c_int32, [c_void_p]),
    "ep_cuda_buffer_destroy": (c_int32, [c_void_p, _ERROR]),
    "ep_cuda_buffer_delete": (None, [c_void_p]),
    "ep_cuda_block_allocate": (c_int32, [c_void_p, c_int64, _OUT, _OUT, POINTER(c_int64), _ERROR]),
    "ep_cuda_block_free": (None, [c_void_p]),
    "ep_cuda_note_free": (None, [c_void_p, c_void_p]),
    "ep_cuda_wait_for_freed": (c_int32, [c_void_p, c_void_p, _ERROR]),
    "ep_cuda_torch_choose": (c_void_p, [c_void_p]),
    "ep_cuda_torch_allocate": (c_void_p, [c_int64, c_int32, c_void_p]),
    "ep_cuda_torch_free": (None, [c_void_p, c_uint64, c_void_p]),
    "ep_cuda_pool_stats": (None, [c_void_p, POINTER(c_int64)]),
    "ep_cuda_dispatch_fresh": (
        c_int32,
        [c_void_p, _DISPATCH, _ORDER, POINTER(Receive), POINTER(FreshCounts), _CALL, _ERROR],
    ),
    "ep_cuda_dispatch": (c_int32, [c_void_p, _DISPATCH, _ORDER, _CALL, _ERROR]),
    "ep_cuda_combine": (c_int32, [c_void_p, _COMBINE, _ORDER, _CALL, _ERROR]),
    "ep_cuda_barrier": (c_int32, [c_void_p, _ORDER, _CALL, _ERROR]),
    "ep_cuda_refuse": (c_int32, [c_void_p, c_char_p, _ORDER, _CALL, _ERROR]),
    "ep_cuda_copy_rate": (
        c_int32,
        [c_void_p, c_int32, c_int64, c_int64, _ORDER, POINTER(c_double), _ERROR],
    ),
    "ep_cuda_is_finished": (c_int32, [c_void_p, c_int64]),
    "ep_cuda_wait": (c_int32, [c_void_p, c_int64, _ERROR]),
    "ep_cuda_check": (c_int32, [c_void_p, c_int64, _ERROR]),
    "ep_cuda_make_stream_wait": (c_int32, [c_void_p, c_int64, c_void_p, _ERROR]),
    "ep_cuda_stamps": (None, [c_void_p, c_int64, POINTER(c_uint64)]),
    "ep_cuda_end_event": (c_void_p, [c_void_p, c_int64]),
}


@functools.cache
def cuda_library() -> ctypes.CDLL:
    """Loads the CUDA core. Raises EPDeviceError if it is not built or does not belong here."""
    return load_library(CUDA_LIBRARY, _SIGNATURES, "ep_cuda_abi_sizes", MIRRORS)
