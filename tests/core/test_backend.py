"""Choice of the backend, and installation: what is missing is named with its cure, and nothing falls back silently."""

import subprocess
from pathlib import Path

import pytest
import torch
from support.implementations import IMPLEMENTATIONS, why_not_tested
from support.processes import python

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
    return python("-W", "always", "-c", code, **environment)


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


@pytest.mark.process
def test_environment_variable_chooses_where_the_call_does_not():
    code = """
import importlib, os, torch
from fastcaps.routing import backend
for name in ("reference", ""):
    os.environ["FASTCAPS_BACKEND"] = name
    importlib.reload(backend)  # reads the variable again, as another process would
    device = torch.device("cpu")
    print(backend.choose_backend(None, device), backend.choose_backend("native", device))
"""
    result = run_python(code)
    assert result.stdout.splitlines() == ["reference native", "native native"], result.stderr


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


@pytest.mark.process
def test_without_the_extension_it_runs_and_says_once_what_it_lacks():
    code = BLOCKED.format(names=["fastcaps._C"]) + (
        "f = torch.compile(fastcaps.dynamic_routing, fullgraph=True, backend='aot_eager')\n"
        "print(torch.equal(f(x, w), fastcaps.dynamic_routing(x, w)))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True\n")
    assert result.stdout.splitlines()[-1] == "True"  # compiled without a graph break
    assert "'native' cannot run on 'cpu': the compiled extension is missing" in result.stdout
    assert "--no-build-isolation" in result.stdout
    assert result.stderr.count("slow reference backend") == 1
    assert "apt-get install g++" in result.stderr


@pytest.mark.process
def test_imports_without_optional_packages():
    result = run_python(BLOCKED.format(names=["triton", "sklearn", "matplotlib", "rich"]))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True\n")
    assert "slow reference" not in result.stderr
