"""The steps of a call over several nodes, seen through their C interface
(`csrc/bindings/lane_api.h`, structures in `csrc/core/lane_args.h` and
`csrc/cpu/lane.h`)."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char, c_char_p, c_int32, c_int64, c_uint64, c_void_p

from ep_kernels._native import (
    CPU_LIBRARY,
    CombineArgs,
    DispatchArgs,
    ErrorRecord,
    Signatures,
    Sizes,
    load_library,
)

OFFER_WORDS = 6  # int64 words of an Offer
NUM_POST_FIELDS = 11
MAX_TEXT = 512


class LanePost(Structure):
    _fields_ = [
        ("num_tokens", c_int64),
        ("chunk_tokens", c_int64),
        ("num_topk", c_int64),
        ("fields", c_int64 * NUM_POST_FIELDS),
        ("capacity", c_int64),
        ("offer", c_int64 * OFFER_WORDS),
        ("text", c_char * MAX_TEXT),
    ]


class OfferSlot(Structure):
    _fields_ = [("offer", c_int64 * OFFER_WORDS), ("text", c_char * MAX_TEXT)]


class LaneTokensArgs(Structure):
    _fields_ = [
        ("topk_idx", c_void_p),
        ("tokens", c_void_p),
        ("choices", c_void_p),
        ("bounds", c_void_p),
        ("num_tokens", c_int64),
        ("chunk_tokens", c_int64),
        ("num_topk", c_int64),
        ("node", c_int32),
    ]


class LanePackArgs(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("scales", c_void_p),
        ("topk_weights", c_void_p),
        ("tokens", c_void_p),
        ("message", c_void_p),
        ("num_tokens", c_int64),
        ("row_bytes", c_int64),
        ("scale_bytes", c_int64),
        ("weight_bytes", c_int64),
        ("num_topk", c_int64),
        ("num_threads", c_int32),
    ]


class LanePlanArgs(Structure):
    _fields_ = [
        ("choices", c_void_p),
        ("topk_idx", c_void_p),
        ("rows", c_void_p),
        ("routes", c_void_p),
        ("next", c_void_p),
        ("num_tokens", c_int64),
        ("num_topk", c_int64),
        ("layout", c_int32),
    ]


class LaneSums(Structure):
    _fields_ = [
        ("tokens", c_void_p),
        ("rows", c_void_p),
        ("topk_weights", c_void_p),
        ("num_tokens", c_int64),
    ]


class LaneMergeArgs(Structure):
    _fields_ = [
        ("nodes", POINTER(LaneSums)),
        ("own_sums", c_void_p),
        ("bias", c_void_p * 2),
        ("out", c_void_p),
        ("out_topk_weights", c_void_p),
        ("first_token", c_int64),
        ("num_tokens", c_int64),
        ("row_bytes", c_int64),
        ("weight_bytes", c_int64),
        ("num_topk", c_int64),
        ("own_node", c_int32),
        ("num_nodes", c_int32),
        ("row_type", c_int32),
        ("num_threads", c_int32),
    ]


MIRRORS = (
    LanePost,
    OfferSlot,
    LaneTokensArgs,
    LanePackArgs,
    LanePlanArgs,
    LaneSums,
    LaneMergeArgs,
)

_ERROR = POINTER(ErrorRecord)
_SIGNATURES: Signatures = {
    "ep_lane_abi_sizes": (None, [POINTER(c_int32)]),
    "ep_lane_post_bytes": (c_int64, [c_void_p]),
    "ep_lane_dispatch_post": (
        c_int32,
        [c_void_p, POINTER(DispatchArgs), c_int64, c_void_p, _ERROR],
    ),
    "ep_lane_combine_post": (c_int32, [c_void_p, POINTER(CombineArgs), c_void_p, _ERROR]),
    "ep_lane_barrier_post": (c_int32, [c_void_p, c_void_p, _ERROR]),
    "ep_lane_refusal": (c_int32, [c_void_p, c_char_p, c_void_p, _ERROR]),
    "ep_lane_offer": (c_int32, [POINTER(DispatchArgs), c_char_p, c_void_p, _ERROR]),
    "ep_lane_begin": (c_int32, [c_void_p, POINTER(c_uint64), _ERROR]),
    "ep_lane_check_usable": (c_int32, [c_void_p, _ERROR]),
    "ep_lane_wait_slot": (c_int32, [c_void_p, c_uint64, c_void_p, _ERROR]),
    "ep_lane_send_post": (c_int32, [c_void_p, c_uint64, c_int32, c_void_p, _ERROR]),
    "ep_lane_wait_posts": (c_int32, [c_void_p, c_uint64, c_void_p, c_void_p, _ERROR]),
    "ep_lane_send_offer": (c_int32, [c_void_p, c_uint64, c_int32, c_void_p, _ERROR]),
    "ep_lane_wait_offers": (c_int32, [c_void_p, c_uint64, c_void_p, c_void_p, _ERROR]),
    "ep_lane_done": (c_int32, [c_void_p, c_uint64, _ERROR]),
    "ep_lane_wait_done": (c_int32, [c_void_p, c_uint64, c_void_p, _ERROR]),
    "ep_lane_waiting_for": (c_int32, [c_void_p, c_int32, _ERROR]),
    "ep_lane_fail": (c_int32, [c_void_p, c_int32, c_int32, c_char_p, _ERROR]),
    "ep_lane_clear_routing": (c_int32, [c_void_p, POINTER(DispatchArgs), _ERROR]),
    "ep_lane_plan": (c_int32, [c_void_p, c_uint64, POINTER(DispatchArgs), _ERROR]),
    "ep_lane_first_rows": (
        c_int32,
        [c_void_p, c_uint64, c_int32, POINTER(Sizes), c_void_p, _ERROR],
    ),
    "ep_lane_plan_tokens": (c_int32, [c_void_p, c_uint64, POINTER(LanePlanArgs), _ERROR]),
    "ep_lane_tokens": (c_int32, [c_void_p, POINTER(LaneTokensArgs), _ERROR]),
    "ep_lane_pack": (c_int32, [c_void_p, POINTER(LanePackArgs), _ERROR]),
    "ep_lane_send_rows": (c_int32, [c_void_p, POINTER(DispatchArgs), c_void_p, _ERROR]),
    "ep_lane_fill_padding": (c_int32, [c_void_p, POINTER(DispatchArgs), _ERROR]),
    "ep_lane_stage_rows": (c_int32, [c_void_p, POINTER(CombineArgs), _ERROR]),
    "ep_lane_reduce_rows": (c_int32, [c_void_p, POINTER(CombineArgs), c_void_p, _ERROR]),
    "ep_lane_merge": (c_int32, [c_void_p, POINTER(LaneMergeArgs), _ERROR]),
}


@functools.cache
def lane_library() -> ctypes.CDLL:
    """The CPU core again, with these functions. Raises EPDeviceError as load_library()."""
    return load_library(CPU_LIBRARY, _SIGNATURES, "ep_lane_abi_sizes", MIRRORS)
