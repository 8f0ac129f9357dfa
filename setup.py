"""Thin build: setuptools collects Python files, CMake and Ninja make attnfast._C, and attnfast._cuda if asked to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent


class Variant(egg_info):
    """With ATTNFAST_CUDA=ON the version of a wheel ends in ``+cuda``: both variants can lie in one place."""

    def finalize_options(self) -> None:
        if os.environ.get("ATTNFAST_CUDA", "").upper() == "ON" and "sdist" not in self.distribution.commands:
            self.tag_build = "+cuda"  # here, because an sdist's own setup.cfg empties the option
        super().finalize_options()


class CMakeBuild(build_ext):
    """Runs CMake for the one extension; an editable install puts the binary beside the sources."""

    def build_extension(self, ext: Extension) -> None:
        # Build requirements, absent when only metadata is asked for. The tools are called by path, because
        # `.venv/bin/python setup.py` has them installed but not on PATH.
        import cmake
        import ninja
        import pybind11

        target = (Path.cwd() / self.get_ext_fullpath(ext.name)).resolve()
        # An editable install compiles where `build_ext --inplace` does, so that either continues the other's work.
        shared = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        build = (Path.cwd() / (shared if self.editable_mode else self.build_temp) / "cmake").resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DATTNFAST_VERSION={self.distribution.get_version().partition('+')[0]}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        # With build isolation the tools live in another temporary folder at every run: what the cache remembers of
        # them is overridden above, and objects are kept.
        cmake_program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        subprocess.check_call([cmake_program, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *configure])
        jobs = str(self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1)
        subprocess.check_call([cmake_program, "--build", str(build), "--parallel", jobs])


setup(ext_modules=[Extension("attnfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild, "egg_info": Variant})
