"""The compiled NVSHMEM part, seen through its C interface (`csrc/bindings/nvshmem_api.h`)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from ep_kernels import env
from ep_kernels._native import LIB_DIR, ErrorRecord, Signatures, load_library
from ep_kernels._native_ll import CUDA_SIGNATURES, LL_MIRRORS
from ep_kernels.errors import EPDeviceError

NVSHMEM_LIBRARY = LIB_DIR / "libep_nvshmem.so"
HOST_LIBRARY = "libnvshmem_host.so.3"
PACKAGES = "nvidia-nvshmem-cu13 (nvidia-nvshmem-cu12 for CUDA 12)"
UNIQUE_ID_BYTES = 128
MAX_SECTIONS = 4


class NvshmemConfig(Structure):
    _fields_ = [
        ("device", c_int32),
        ("node", c_int32),
        ("num_nodes", c_int32),
        ("num_channels", c_int32),
        ("num_slots", c_int32),
        ("is_direct", c_int32),
        ("staging_bytes", c_int64),
        ("timeout_us", c_int64),
        ("pes", POINTER(c_int32)),
        ("ranks", POINTER(c_int32)),
    ]


class LaneSection(Structure):
    _fields_ = [("src", c_void_p), ("dst", c_void_p), ("bytes", c_int64)]


class LaneCounts(Structure):
    _fields_ = [
        ("send_first", c_int64),
        ("num_sent", c_int64),
        ("recv_first", c_int64),
        ("num_received", c_int64),
    ]


class LaneExchangeArgs(Structure):
    _fields_ = [
        ("sections", LaneSection * MAX_SECTIONS),
        ("tokens", c_void_p),
        ("counts", c_void_p),
    ]


class NvshmemLlConfig(Structure):
    _fields_ = [
        ("device", c_int32),
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("num_local_ranks", c_int32),
        ("num_experts", c_int32),
        ("direct", c_int32),
        ("region_bytes", c_int64),
        ("timeout_us", c_int64),
        ("pes", POINTER(c_int32)),
        ("expert_rank", POINTER(c_int32)),
    ]


MIRRORS = (NvshmemConfig, LaneSection, LaneCounts, LaneExchangeArgs)

_ERROR, _OUT = POINTER(ErrorRecord), POINTER(c_void_p)
_SIGNATURES: Signatures = {
    "ep_nvshmem_abi_sizes": (None, [POINTER(c_int32)]),
    "ep_nvshmem_version": (None, [POINTER(c_int32)]),
    "ep_nvshmem_unique_id": (c_int32, [c_char_p, _ERROR]),
    "ep_nvshmem_join": (c_int32, [c_int32, c_int32, c_int32, c_char_p, _ERROR]),
    "ep_nvshmem_leave": (c_int32, [_ERROR]),
    "ep_nvshmem_lane_create": (
        c_int32,
        [POINTER(NvshmemConfig), _OUT, POINTER(c_int64), _ERROR],
    ),
    "ep_nvshmem_lane_exchange": (
        c_int32,
        [c_void_p, POINTER(LaneExchangeArgs), c_void_p, _ERROR],
    ),
    "ep_nvshmem_lane_exchange_bytes": (
        c_int32,
        [c_void_p, POINTER(LaneExchangeArgs), c_void_p, _ERROR],
    ),
    "ep_nvshmem_lane_check": (c_int32, [c_void_p, _ERROR]),
    "ep_nvshmem_lane_destroy": (c_int32, [c_void_p, _ERROR]),
    "ep_nvshmem_lane_delete": (None, [c_void_p]),
}


_LL_SIGNATURES: Signatures = {
    "ep_nvshmem_ll_abi_sizes": (None, [POINTER(c_int32)]),
    "ep_nvshmem_ll_memory_create": (
        c_int32,
        [POINTER(NvshmemLlConfig), _OUT, POINTER(c_uint64), POINTER(c_int32), _ERROR],
    ),
    "ep_nvshmem_ll_memory_add_far_rows": (c_int32, [c_void_p, _ERROR]),
    "ep_nvshmem_ll_create": (c_int32, [c_void_p, c_int64, _OUT, _ERROR]),
    "ep_nvshmem_ll_memory_leave": (c_int32, [c_void_p, _ERROR]),
    "ep_nvshmem_ll_memory_destroy": (c_int32, [c_void_p, _ERROR]),
    "ep_nvshmem_ll_memory_delete": (None, [c_void_p]),
}


@functools.cache
def nvshmem_library() -> ctypes.CDLL:
    """Loads the NVSHMEM part, and NVSHMEM itself before it.

    Raises:
        EPDeviceError: naming what is missing: the part, or NVSHMEM.
    """
    if not NVSHMEM_LIBRARY.exists():
        raise EPDeviceError(
            f"{NVSHMEM_LIBRARY.name} is not built: install the CUDA toolkit (nvcc) and {PACKAGES}, "
            "then run `pip install -e .` in the sources"
        )
    _load_nvshmem()
    return load_library(NVSHMEM_LIBRARY, _SIGNATURES, "ep_nvshmem_abi_sizes", MIRRORS)


@functools.cache
def nvshmem_ll_library() -> ctypes.CDLL:
    """Its low-latency calls: those of the CUDA core but for what makes them. Raises EPDeviceError
    as nvshmem_library()."""
    nvshmem_library()
    calls = {name: of for name, of in CUDA_SIGNATURES.items() if name != "ep_cuda_ll_create"}
    mirrors = (NvshmemLlConfig, *LL_MIRRORS)
    return load_library(
        NVSHMEM_LIBRARY, {**calls, **_LL_SIGNATURES}, "ep_nvshmem_ll_abi_sizes", mirrors
    )


def nvshmem_version() -> str:
    """Of the NVSHMEM that is loaded. Raises EPDeviceError as nvshmem_library()."""
    version = (c_int32 * 3)()
    nvshmem_library().ep_nvshmem_version(version)
    return ".".join(map(str, version))


def _load_nvshmem() -> None:
    """The part finds a library of this name that is loaded already."""
    tried = []
    for path in _candidates():
        try:
            ctypes.CDLL(path)
        except OSError as error:
            tried.append(str(error))
        else:
            return
    raise EPDeviceError(
        f"NVSHMEM cannot be loaded: install {PACKAGES}, or set NVSHMEM_HOME ({'; '.join(tried)})"
    )


def _candidates() -> Iterator[str]:
    """That of NVSHMEM_HOME alone if it is set; else of the package, then of the system."""
    if home := env.nvshmem_home():
        yield str(Path(home) / "lib" / HOST_LIBRARY)
        return
    package = importlib.util.find_spec("nvidia")
    for place in [] if package is None else package.submodule_search_locations or []:
        path = Path(place) / "nvshmem" / "lib" / HOST_LIBRARY
        if path.exists():
            yield str(path)
    yield HOST_LIBRARY
