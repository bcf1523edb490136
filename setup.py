"""The compiled extension only; all metadata stands in pyproject.toml."""

import glob
import os
import platform
import shutil
import sys
from itertools import chain
from multiprocessing.pool import ThreadPool

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # without build isolation nobody else checks it
    sys.exit(
        f"fastcaps needs setuptools 77 or later to build, found {setuptools.__version__}: pip install -U setuptools"
    )

from setuptools.command.bdist_wheel import bdist_wheel

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512bf16")


def note(message):
    print(f"fastcaps: {message}", file=sys.stderr)


class BuildOptional(build_ext):
    """A missing or failing compiler must not stop the installation: the package runs without the extension."""

    def build_extensions(self):
        compiler = (getattr(self.compiler, "compiler_cxx", None) or [None])[0]
        if self.compiler.compiler_type != "msvc" and not (compiler and shutil.which(compiler)):
            note(f"no C++ compiler ({compiler or 'g++'} not found): installing without the native backend")
            return
        # A file for every instruction set, and nobody else compiles them side by side.
        compile_all = self.compiler.compile
        with ThreadPool(os.cpu_count()) as pool:
            self.compiler.compile = lambda sources, *args, **kwargs: [
                *chain(*pool.map(lambda source: compile_all([source], *args, **kwargs), sources))
            ]
            super().build_extensions()


class StableWheel(bdist_wheel):
    """One file serves CPython 3.10 and later, unless nothing was compiled."""

    def finalize_options(self):
        if self.distribution.ext_modules:
            self.py_limited_api = "cp310"
        super().finalize_options()


def extensions():
    """The native ops, built against LibTorch's stable ABI: one binary for every PyTorch from 2.10 on."""
    try:
        # Not a build requirement on purpose: an isolated build would download and build against another torch.
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        note("torch is not visible to this build, so the native backend is left out; build with --no-build-isolation")
        return []
    from torch import __version__ as torch_version

    flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall"]
    flags += ["-Wno-unused-function", "-Wno-maybe-uninitialized", "-Wno-psabi"]  # of vector types and lambdas
    return [
        Extension(
            "fastcaps._C",
            [
                "csrc/ops.cpp",
                *(f"csrc/dynamic_routing_{isa}.cpp" for isa in INSTRUCTION_SETS),
            ],
            depends=glob.glob("csrc/*.h"),
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch", "torch_cpu", "c10"],
            define_macros=[
                ("Py_LIMITED_API", "0x030A0000"),
                ("TORCH_STABLE_ONLY", None),
                ("TORCH_TARGET_VERSION", "0x020a000000000000"),
                ("FASTCAPS_BUILD", f'"CPU ({platform.machine()}), built with torch {torch_version}"'),
            ],
            extra_compile_args=flags,
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOptional, "bdist_wheel": StableWheel})
