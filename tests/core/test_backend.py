"""Choice of the backend, and installation: what is missing is named with its cure, and nothing falls back silently."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.implementations import IMPLEMENTATIONS, why_not_tested

import fastcaps
from fastcaps.routing import backend as backends
from fastcaps.routing.backend import BackendUnavailable, choose_backend, why_unavailable

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("pair", IMPLEMENTATIONS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_every_implementation_is_tested_or_reported(pair):
    reason = why_not_tested(*pair)
    assert reason is None or pair != ("native", "cpu"), reason  # `make test` builds it: its absence is a failure
    if reason is not None:
        pytest.skip(f"{pair[0]} on {pair[1]}: {reason}")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_default_is_the_fastest_that_can_run(monkeypatch):
    monkeypatch.setattr(backends, "ENVIRONMENT", None)
    assert choose_backend(None, CPU) == "native"
    assert choose_backend("reference", CPU) == "reference"
    assert choose_backend(None, torch.device("meta")) == "reference"


def test_unknown_and_unavailable_backends_raise_and_never_fall_back(monkeypatch):
    with pytest.raises(
        ValueError, match=r"backend must be one of 'native', 'triton', 'reference', got 'cuda'"
    ) as error:
        choose_backend("cuda", CPU)
    assert not isinstance(error.value, BackendUnavailable)
    if not backends.INTERPRET:
        with pytest.raises(
            BackendUnavailable, match="'triton' cannot run on 'cpu': the Triton kernels are for CUDA tensors"
        ):
            choose_backend("triton", CPU)
    with pytest.raises(BackendUnavailable, match="native kernels are for CPU and CUDA tensors"):
        choose_backend("native", torch.device("meta"))
    with pytest.raises(ValueError, match="backend must be one of"):
        why_unavailable("cuda", "cpu")
    monkeypatch.setattr(backends, "ENVIRONMENT", "fast")
    with pytest.raises(ValueError, match="FASTCAPS_BACKEND must be one of"):
        choose_backend(None, CPU)
    monkeypatch.setattr(backends, "ENVIRONMENT", "triton")
    with pytest.raises(BackendUnavailable, match="FASTCAPS_BACKEND 'triton' cannot run"):
        choose_backend(None, torch.device("meta"))


@pytest.mark.parametrize("kind", [fastcaps.BackendUnavailable, RuntimeError, ValueError])
def test_a_named_backend_that_cannot_run_is_an_error_of_its_own_kind(kind):
    """A caller may catch it as what it is, as a failure of the machine, or as a wrong argument."""
    with pytest.raises(kind, match="not for 'meta'"):
        fastcaps.route_votes(torch.zeros(1, 2, 3, 4, device="meta"), backend="native")


def test_environment_variable_chooses_where_the_call_does_not():
    code = (
        "import torch; from fastcaps.routing.backend import choose_backend as c; d = torch.device('cpu');"
        "print(c(None, d), c('native', d))"
    )
    assert run_python(code, FASTCAPS_BACKEND="reference").stdout.split() == ["reference", "native"]
    assert run_python(code, FASTCAPS_BACKEND="").stdout.split() == ["native", "native"]


BLOCKED = """
import sys
for name in {names}:
    sys.modules[name] = None  # import raises ModuleNotFoundError
import torch, fastcaps
x, w = torch.randn(2, 5, 3, requires_grad=True), torch.randn(5, 4, 2, 3)
for _ in range(3):
    fastcaps.dynamic_routing(x, w).sum().backward()
print(x.grad.isfinite().all().item())
try:
    fastcaps.dynamic_routing(x, w, backend="native")
except ValueError as error:
    print(error)
"""


def test_without_the_extension_it_runs_and_says_once_what_it_lacks():
    result = run_python(BLOCKED.format(names=["fastcaps._C"]))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True\n")
    assert "'native' cannot run on 'cpu': the compiled extension is missing" in result.stdout
    assert "--no-build-isolation" in result.stdout
    assert result.stderr.count("slow reference backend") == 1
    assert "apt-get install g++" in result.stderr


def test_without_the_extension_a_compiled_function_has_no_graph_break():
    code = BLOCKED.format(names=["fastcaps._C"]) + (
        "f = torch.compile(fastcaps.dynamic_routing, fullgraph=True, backend='aot_eager')\n"
        "print(torch.equal(f(x, w), fastcaps.dynamic_routing(x, w)))"
    )
    result = run_python(code)
    assert result.stdout.splitlines()[-1] == "True", result.stderr


@pytest.mark.parametrize("names", [["triton"], ["sklearn", "matplotlib", "rich"]], ids=str)
def test_imports_without_optional_packages(names):
    result = run_python(BLOCKED.format(names=names))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True\n")
    assert "slow reference" not in result.stderr


def test_a_broken_extension_is_reported_with_its_error(tmp_path):
    shutil.copytree(ROOT / "fastcaps", tmp_path / "fastcaps", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "fastcaps" / "_C.abi3.so").write_bytes(b"not a library")
    code = "import fastcaps; from fastcaps.routing.backend import why_unavailable as w; print(w('native', 'cpu'))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
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
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastcaps", "csrc"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    environment = {**os.environ, "PATH": path}
    environment.pop("CXX", None)
    environment.pop("CC", None)
    result = subprocess.run(
        [sys.executable, "-c", SETUP.format(blocked=blocked)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
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
