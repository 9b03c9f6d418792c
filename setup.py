"""Puts the compiled core into the package; everything else is in pyproject.toml.

The libraries need neither Python nor torch to build, so the wheel's tag is py3-none-<platform>.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build front ends do not put the project's folder there

import build_native  # noqa: E402


class BinaryDistribution(Distribution):
    """Makes setuptools treat the package as platform-specific although it has no extensions."""

    def has_ext_modules(self) -> bool:
        return True


class BuildNative(Command):
    """`build` step that compiles the core: into the checkout for `pip install -e`."""

    description = "build the compiled core (see build_native.py)"
    user_options = [("inplace", "i", "put the libraries into the source tree")]
    boolean_options = ["inplace"]
    editable_mode = False

    def initialize_options(self) -> None:
        self.inplace = False
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        try:
            build_native.build(self._lib_dir())
        except build_native.BuildError as error:
            raise CompileError(str(error)) from error

    def get_source_files(self) -> list[str]:
        sources = {path for lib in build_native.plan_libraries() for path in lib.sources}
        return sorted(str(path.relative_to(ROOT)) for path in sources)

    def get_outputs(self) -> list[str]:
        return [str(self._lib_dir() / lib.name) for lib in build_native.plan_libraries()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _lib_dir(self) -> Path:
        if self.editable_mode or self.inplace:
            return build_native.LIB_DIR
        return Path(str(self.build_lib)) / "ep_kernels" / "lib"


class Build(build):
    """Starts every wheel from an empty folder: files that were deleted since must not get in."""

    sub_commands = [*build.sub_commands, ("build_native", None)]

    def run(self) -> None:
        if not getattr(self.distribution.get_command_obj("build_py"), "editable_mode", False):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=BinaryDistribution,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": AnyPythonWheel},
)
