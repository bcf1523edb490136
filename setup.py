"""The compiled extension only; all metadata stands in pyproject.toml."""

import glob
import os
import platform
import re
import shutil
import subprocess
import sys
import zlib
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
CUDA_ARCHITECTURES = ("80", "90", "100", "120")
CUDA = os.environ.get("FASTCAPS_CUDA", "auto")
if CUDA not in ("auto", "0", "1"):
    sys.exit(f"FASTCAPS_CUDA must be auto, 0 or 1, got {CUDA!r}")


def note(message):
    print(f"fastcaps: {message}", file=sys.stderr)


def left_out(part, reason):
    """A part that the package can be without, unless FASTCAPS_CUDA=1 demands the CUDA kernels."""
    if CUDA == "1":
        sys.exit(f"fastcaps: FASTCAPS_CUDA=1, but there will be no CUDA kernels: {reason}")
    note(f"installing without {part}: {reason}")


class BuildOptional(build_ext):
    """A missing or failing compiler must not stop the installation: the package runs without the extension."""

    def build_extensions(self):
        compiler = (getattr(self.compiler, "compiler_cxx", None) or [None])[0]
        if self.compiler.compiler_type != "msvc" and not (compiler and shutil.which(compiler)):
            left_out("the native backend", f"no C++ compiler ({compiler or 'g++'} not found)")
            return
        # Many files that each take long, and nobody else compiles them side by side.
        compile_all = self.compiler.compile
        with ThreadPool(os.cpu_count()) as pool:
            cuda = self.cuda_objects(pool)
            self.compiler.compile = lambda sources, *args, **kwargs: [
                *chain(*pool.map(lambda source: compile_all([source], *args, **kwargs), sources))
            ]
            for extension in self.extensions:
                add_cuda(extension, cuda)
            super().build_extensions()

    def cuda_objects(self, pool):
        """(Where the toolkit is, the architectures, the compiled kernels), or None."""
        if CUDA == "0" or not self.extensions:
            return None
        try:
            return compile_cuda(pool, self.build_temp)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            left_out("CUDA kernels", error)
            return None


def find_nvcc():
    """The CUDA compiler and the toolkit that it belongs to."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not sys.platform.startswith("linux") or not os.access(nvcc, os.X_OK):
        raise RuntimeError(f"no CUDA toolkit ({nvcc} is not there; CUDA_HOME says where one is)")
    # nvcc may be a script that calls another one: that one's folder is the toolkit's.
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    here = re.search(r"_HERE_=(\S+)", said)
    toolkit = os.path.dirname(here[1] if here else os.path.dirname(os.path.realpath(nvcc)))
    folders = ("lib64", f"targets/{platform.machine()}-linux/lib", "lib")
    libraries = [os.path.join(toolkit, folder) for folder in folders]
    library = next((d for d in libraries if os.path.exists(os.path.join(d, "libcudart_static.a"))), None)
    if library is None:
        raise RuntimeError(f"{nvcc} has no libcudart_static.a in {' or '.join(libraries)}")
    return nvcc, library


def compile_cuda(pool, folder):
    """Compile csrc/cuda/*.cu to PTX of the oldest architecture, and that for each: the kernels use nothing newer."""
    nvcc, library = find_nvcc()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    architectures = [a for a in CUDA_ARCHITECTURES if f"sm_{a}" in known]
    if not architectures:
        raise RuntimeError(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
    oldest = f"compute_{architectures[0]}"
    targets = ",".join([oldest, *(f"sm_{a}" for a in architectures)])
    flags = ["-std=c++20", "-O3", "-Icsrc", "--expt-relaxed-constexpr", f"-gencode=arch={oldest},code=[{targets}]"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    new = int(re.search(r"release (\d+)", release)[1]) >= 13
    flags.append("--compress-mode=size" if new else "-Xfatbin=-compress-all")  # a third of the size
    # What another compiler or other flags have left does not count, nor what a killed build has left half written.
    command = [nvcc, *flags]
    folder = os.path.join(folder, f"cuda-{zlib.crc32(repr((release, command)).encode()):08x}")
    os.makedirs(folder, exist_ok=True)
    newest = max(os.path.getmtime(path) for path in [*glob.glob("csrc/**/*", recursive=True), __file__])

    def compile_one(source):
        target = os.path.join(folder, os.path.basename(source) + ".o")
        if os.path.exists(target) and os.path.getmtime(target) > newest:
            return target
        subprocess.run([*command, "-c", source, "-o", target + ".new"], check=True)
        os.replace(target + ".new", target)
        return target

    return library, architectures, pool.map(compile_one, sorted(glob.glob("csrc/cuda/*.cu")))


def add_cuda(extension, cuda):
    """Link the CUDA kernels, if there are some, and say what the extension was built with."""
    kinds = [f"CPU ({platform.machine()})"]
    if cuda is not None:
        library, architectures, objects = cuda
        kinds.append(f"CUDA (sm_{', sm_'.join(architectures)})")
        extension.extra_objects += objects
        extension.define_macros.append(("FASTCAPS_WITH_CUDA", None))
        # libtorch stays in the list of what the file needs, although it uses nothing of it: so the stream's function
        # in libtorch_cuda is found where there is one.
        # Functions of Python are bound when they are called, which in a program without Python they never are.
        extension.extra_link_args += ["-Wl,-z,lazy", "-Wl,--no-as-needed", "-ltorch", f"-L{library}", "-lcudart_static"]
        extension.extra_link_args += ["-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,ALL"]
    extension.define_macros.append(("FASTCAPS_BUILD", f'"{" and ".join(kinds)}, built with torch {TORCH}"'))


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
        left_out("the native backend", "torch is not visible to this build; build with --no-build-isolation")
        return []

    flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall"]
    flags += ["-Wno-unused-function", "-Wno-maybe-uninitialized", "-Wno-psabi"]  # of vector types and lambdas
    return [
        Extension(
            "fastcaps._C",
            [
                "csrc/ops.cpp",
                *(f"csrc/cpu/{isa}.cpp" for isa in INSTRUCTION_SETS),
            ],
            depends=[path for kind in ("h", "cu") for path in glob.glob(f"csrc/**/*.{kind}", recursive=True)],
            include_dirs=["csrc", *include_paths()],
            library_dirs=library_paths(),
            libraries=["torch", "torch_cpu", "c10"],
            define_macros=[
                ("Py_LIMITED_API", "0x030A0000"),
                ("TORCH_STABLE_ONLY", None),
                ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            ],
            extra_compile_args=flags,
            language="c++",
            py_limited_api=True,
            optional=CUDA != "1",
        )
    ]


try:
    from torch import __version__ as TORCH
except ImportError:
    TORCH = None
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOptional, "bdist_wheel": StableWheel})
