"""Makes `import deep_ep` mean ep_kernels.deep_ep."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from ep_kernels.errors import EPConfigError

_PACKAGE = __name__.rpartition(".")[0]
_NAMES = {
    "deep_ep": _PACKAGE,
    "deep_ep.buffer": f"{_PACKAGE}.buffer",
    "deep_ep.utils": f"{_PACKAGE}.utils",
}
_IMPORT_PATH = str(Path(__file__).with_name("import_path"))


def install() -> None:
    """From now on `import deep_ep` gives ep_kernels.deep_ep, also in processes that
    multiprocessing spawns. Idempotent.

    Raises:
        EPConfigError: another deep_ep has been imported already.
    """
    loaded = sys.modules.get("deep_ep")
    ours = sys.modules[_PACKAGE]
    origin = str(getattr(loaded, "__file__", "?"))
    if loaded not in (None, ours) and not origin.startswith(_IMPORT_PATH):
        raise EPConfigError(f"deep_ep was imported before install(), from {origin}")
    for name, target in _NAMES.items():
        sys.modules[name] = sys.modules[target]
    if _IMPORT_PATH not in sys.path:  # multiprocessing hands sys.path to the processes it spawns
        sys.path.insert(0, _IMPORT_PATH)


def install_if_missing() -> None:
    """install(), unless there is another deep_ep to import."""
    if importlib.util.find_spec("deep_ep") is None:
        install()


def uninstall() -> None:
    """Undoes install(); modules that have imported deep_ep keep it. Idempotent."""
    for name, target in _NAMES.items():
        if name in sys.modules and sys.modules[name] is sys.modules.get(target):
            del sys.modules[name]
    if _IMPORT_PATH in sys.path:
        sys.path.remove(_IMPORT_PATH)
