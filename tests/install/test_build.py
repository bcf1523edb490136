"""Building and loading the extension: what is missing is named with its cure, and the package works without."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.processes import ROOT, python

import fastcaps

pytestmark = pytest.mark.process


def copy_sources(folder: Path) -> None:
    """What a build needs."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastcaps", "csrc"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)


def test_a_broken_extension_is_reported_with_its_error(tmp_path):
    shutil.copytree(ROOT / "fastcaps", tmp_path / "fastcaps", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "fastcaps" / "_C.abi3.so").write_bytes(b"not a library")
    code = "import fastcaps; from fastcaps.routing.backend import why_unavailable as w; print(w('native', 'cpu'))"
    result = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "does not load" in result.stdout, result.stderr
    assert "--no-build-isolation" in result.stdout


SETUP = """
import sys
for name in {blocked}:
    sys.modules[name] = None
sys.argv = ["setup.py", "build_ext", "--build-lib", "out", "--build-temp", "tmp"]
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""


@pytest.mark.parametrize(
    ("blocked", "path", "message"),
    [([], "/nonexistent", "no C++ compiler"), (["torch"], os.environ.get("PATH", ""), "torch is not visible")],
    ids=["no compiler", "no torch"],
)
def test_installs_without_a_compiler_and_without_torch(tmp_path, blocked, path, message):
    copy_sources(tmp_path)
    result = python("-c", SETUP.format(blocked=blocked), cwd=tmp_path, without=("CXX", "CC"), PATH=path)
    assert result.returncode == 0, result.stderr
    assert message in result.stderr
    assert not list((tmp_path / "out").glob("**/*.so"))


def test_extension_knows_no_particular_torch():
    """One abi3 file for every torch from 2.10: it may use C symbols of the stable ABI only, none of torch's C++."""
    (library,) = (ROOT / "fastcaps").glob("_C*.so")
    assert library.name == "_C.abi3.so"
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", library], capture_output=True, text=True, check=True
    )
    foreign = [line.split()[-1] for line in symbols.stdout.splitlines() if "at::" in line or "c10::" in line]
    assert not foreign
    assert "aoti_torch" in symbols.stdout
    assert fastcaps.routing.backend.EXTENSION_BUILD.startswith("CPU")


@pytest.mark.parametrize(
    ("wanted", "where", "message"),
    [
        ("yes", {}, "FASTCAPS_CUDA must be auto, 0 or 1, got 'yes'"),
        ("1", {"CUDA_HOME": "/nowhere"}, "there will be no CUDA kernels: no CUDA toolkit (/nowhere/bin/nvcc"),
        ("1", {"CXX": "/nowhere/g++"}, "there will be no CUDA kernels: no C++ compiler (/nowhere/g++"),
    ],
    ids=["neither", "no toolkit", "no compiler"],
)
def test_a_build_that_must_have_cuda_says_why_it_fails(tmp_path, wanted, where, message):
    copy_sources(tmp_path)
    command = ("setup.py", "build_ext", "--build-temp", "temp", "--build-lib", "out")
    result = python(*command, cwd=tmp_path, FASTCAPS_CUDA=wanted, **where)
    assert result.returncode != 0
    assert message in result.stderr
