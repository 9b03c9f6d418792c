"""The compiled core, seen through its C interface (`csrc/bindings/c_api.h`).

The structures below mirror `csrc/core/ht_args.h` and `csrc/bindings/c_api.h` field by field; sizes
are compared when the library is loaded.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from ep_kernels.errors import EPConfigError, EPDeviceError, EPError, EPTimeoutError

LIB_DIR = Path(__file__).resolve().parent / "lib"
CPU_LIBRARY = LIB_DIR / "libep_cpu.so"

CONFIG_ERROR, PEER_ERROR, DEVICE_ERROR, TIMEOUT_ERROR = 1, 2, 3, 4
PHASES = {1: "slot", 2: "notify", 3: "offer", 4: "transfer", 5: "rows", 6: "return"}


class ErrorRecord(Structure):
    _fields_ = [
        ("message", c_char * 1024),
        ("rank", c_int32),
        ("phase", c_int32),
        ("peer", c_int32),
        ("expected", c_int64),
        ("seen", c_int64),
    ]


class Config(Structure):
    _fields_ = [
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("num_experts", c_int32),
        ("num_local_ranks", c_int32),
        ("expert_rank", c_void_p),
        ("pool_bytes", c_int64),
        ("timeout_us", c_int64),
    ]


class Sizes(Structure):
    _fields_ = [
        ("num_tokens", c_int64),
        ("row_bytes", c_int64),
        ("scale_bytes", c_int64),
        ("capacity", c_int64),
        ("handle_seq", c_int64),
        ("num_topk", c_int32),
        ("weight_bytes", c_int32),
        ("layout", c_int32),
        ("row_type", c_int32),
        ("expert_alignment", c_int32),
        ("num_threads", c_int32),
        ("scale_type", c_int32),
    ]


class Routing(Structure):
    _fields_ = [
        ("topk_idx", c_void_p),
        ("rows", c_void_p),
        ("routes", c_void_p),
        ("num_recv_tokens_per_expert", c_void_p),
        ("expert_offsets", c_void_p),
        ("own_rows", c_void_p),
        ("recv_sizes", c_void_p),
        ("rank_counts", c_void_p),
    ]


class DispatchArgs(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("scales", c_void_p),
        ("topk_weights", c_void_p),
        ("routing", Routing),
        ("recv_x", c_int64),
        ("recv_scales", c_int64),
        ("recv_topk_idx", c_int64),
        ("recv_topk_weights", c_int64),
        ("recv_chain", c_int64),
        ("cumulative_recv_stats", c_void_p),
        ("wait_recv_cost_stats", c_void_p),
        ("cumulative_stats_bytes", c_int64),
        ("sizes", Sizes),
    ]


class CombineArgs(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("topk_weights", c_void_p),
        ("bias", c_void_p * 2),
        ("routing", Routing),
        ("pool_x", c_int64),
        ("pool_topk_weights", c_int64),
        ("stage_x", c_int32),
        ("stage_topk_weights", c_int32),
        ("out", c_void_p),
        ("out_topk_weights", c_void_p),
        ("wait_recv_cost_stats", c_void_p),
        ("num_rows", c_int64),
        ("sizes", Sizes),
    ]


MIRRORS = (ErrorRecord, Config, Sizes, Routing, DispatchArgs, CombineArgs)

_ERROR = POINTER(ErrorRecord)
_OUT = POINTER(c_void_p)
Signatures = dict[str, tuple[Any, list[Any]]]
_SIGNATURES: Signatures = {
    "ep_abi_sizes": (None, [POINTER(c_int32)]),
    "ep_simd_name": (c_char_p, []),
    "ep_buffer_create": (c_int32, [POINTER(Config), _OUT, POINTER(c_int32), _ERROR]),
    "ep_buffer_attach": (c_int32, [c_void_p, POINTER(c_int64), POINTER(c_int32), _ERROR]),
    "ep_buffer_close_files": (None, [c_void_p]),
    "ep_buffer_destroy": (c_int32, [c_void_p, _ERROR]),
    "ep_buffer_delete": (None, [c_void_p]),
    "ep_block_allocate": (c_int32, [c_void_p, c_int64, _OUT, _OUT, POINTER(c_int64), _ERROR]),
    "ep_block_free": (None, [c_void_p]),
    "ep_pool_stats": (None, [c_void_p, POINTER(c_int64)]),
    "ep_count_rows": (
        c_int32,
        [c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_void_p, _ERROR],
    ),
    "ep_notify": (c_int32, [c_void_p, POINTER(DispatchArgs), POINTER(c_uint64), _ERROR]),
    "ep_send": (
        c_int32,
        [c_void_p, c_uint64, POINTER(DispatchArgs), c_char_p, c_int32, _OUT, _ERROR],
    ),
    "ep_dispatch": (
        c_int32,
        [c_void_p, POINTER(DispatchArgs), c_int32, POINTER(c_uint64), _OUT, _ERROR],
    ),
    "ep_combine": (c_int32, [c_void_p, POINTER(CombineArgs), c_int32, _OUT, _ERROR]),
    "ep_barrier": (c_int32, [c_void_p, _ERROR]),
    "ep_refuse": (c_int32, [c_void_p, c_char_p, _ERROR]),
    "ep_op_is_finished": (c_int32, [c_void_p]),
    "ep_op_wait": (c_int32, [c_void_p, _ERROR]),
    "ep_op_interval": (None, [c_void_p, c_void_p]),
    "ep_op_release": (None, [c_void_p]),
}


@functools.cache
def cpu_library() -> ctypes.CDLL:
    """Loads the CPU core. Raises EPDeviceError as load_library()."""
    return load_library(CPU_LIBRARY, _SIGNATURES, "ep_abi_sizes", MIRRORS)


def address(tensor: Any) -> int | None:
    """Of a tensor's memory; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def load_library(
    path: Path, signatures: Signatures, sizes_function: str, mirrors: tuple[type[Structure], ...]
) -> ctypes.CDLL:
    """Loads a compiled core and compares its structures with `mirrors`.

    Raises:
        EPDeviceError: it is not built, or was built from other sources than this package.
    """
    if not path.exists():
        raise EPDeviceError(f"{path.name} is not built; run `pip install -e .` in the sources")
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise EPDeviceError(
                f"{path.name} does not belong to this version of the package (it lacks {name}); "
                "rebuild it"
            )
        function.restype, function.argtypes = result, arguments
    built = (c_int32 * len(mirrors))()
    getattr(library, sizes_function)(built)
    expected = [ctypes.sizeof(mirror) for mirror in mirrors]
    if list(built) != expected:
        raise EPDeviceError(
            f"{path.name} does not belong to this version of the package (structure sizes "
            f"{list(built)}, expected {expected}); rebuild it"
        )
    return library


def to_exception(status: int, record: ErrorRecord) -> EPError:
    """The exception for a nonzero status of the C interface."""
    message = record.message.decode(errors="replace")
    if status == TIMEOUT_ERROR:
        return EPTimeoutError(
            message,
            rank=record.rank,
            phase=PHASES.get(record.phase, str(record.phase)),
            peer=record.peer,
            expected=record.expected,
            seen=record.seen,
        )
    if status in (CONFIG_ERROR, PEER_ERROR):
        return EPConfigError(message)
    return EPDeviceError(message)


def call(function: Any, *arguments: Any) -> None:
    """Calls a function of the C interface that ends with an error record; raises its error."""
    record = ErrorRecord()
    status = function(*arguments, ctypes.byref(record))
    if status:
        raise to_exception(status, record)
