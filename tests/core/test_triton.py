"""The Triton backend where there is no GPU: launch parameters, tuning, the benchmark, the choice of the backend.

Its numbers are those of test_dynamic_routing.py and test_contracts.py with TRITON_INTERPRET=1 in the environment.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from support.processes import python

import fastcaps
from fastcaps import cli
from fastcaps.routing import backend as backends
from fastcaps.routing.backend import choose_backend, why_unavailable
from fastcaps.routing.dynamic.arguments import Options, Tensors

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton", reason="Triton is not installed: it is for Linux only")
launch = pytest.importorskip("fastcaps.routing.dynamic.triton.launch")
parameters = pytest.importorskip("fastcaps.routing.dynamic.triton.parameters")
tuning = pytest.importorskip("fastcaps.routing.dynamic.triton.tuning")

# --------------------------------------------------------------------------------------------------------------- tuning


def test_the_table_comes_before_the_heuristic(monkeypatch, tmp_path):
    table = tmp_path / "tuned.json"
    monkeypatch.setattr(parameters, "TUNED", table)
    monkeypatch.setattr(tuning, "TUNED", table)
    monkeypatch.setattr(launch, "_gpu", lambda index: ("some GPU", 132))
    parameters.tuned.cache_clear()
    like = {"device": "meta"}
    tensors = Tensors(torch.empty(60, 9, 4, **like), torch.empty(9, 5, 16, 4, **like))
    call = launch.Call(tensors, Options(3, leaky=False, detach=False, eps=0.0))
    heuristic = call.parameters("sum")
    other = heuristic._replace(JG=4, JT=2, num_warps=4)
    tuning._write("some GPU", {call.key("sum", 0): other})
    parameters.tuned.cache_clear()
    try:
        assert call.parameters("sum") == other
        assert call.parameters("dV") != other
        monkeypatch.setattr(call, "gpu", "another GPU")
        assert call.parameters("sum") == heuristic
    finally:
        parameters.tuned.cache_clear()


@pytest.mark.parametrize("content", ["{", "[1]", '{"some GPU": [1]}', '{"some GPU": {"a": {"unknown": 1}}}'])
def test_a_damaged_table_is_named(monkeypatch, tmp_path, content):
    (tmp_path / "tuned.json").write_text(content)
    monkeypatch.setattr(parameters, "TUNED", tmp_path / "tuned.json")
    parameters.tuned.cache_clear()
    with pytest.raises(ValueError, match=r"tuned\.json is not"):
        parameters.tuned("some GPU")


@pytest.mark.parametrize("J", [1, 10, 100])
def test_candidates_are_tiles_that_cover_the_capsules(J):
    start = parameters.sweep_parameters(J, 8, 16, False, 3, 4)
    found = tuning.candidates(start, J)
    assert found[0] == start
    assert len(found) == len(set(found)) > 5
    for p in found:
        assert 1 <= p.num_warps <= 8
        tiles = -(-J // (p.JG * p.JT))
        assert (tiles - 1) * p.JG * p.JT < J <= tiles * p.JG * p.JT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_needs_a_gpu(capsys):
    assert cli.main(["tune", "2", "3", "4", "5", "6"]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ benchmark


@pytest.mark.process
@pytest.mark.slow
def test_gpu_bench_writes_its_file(tmp_path):
    out = tmp_path / "bench.json"
    command = ("benchmarks/gpu_bench.py", "--device", "cpu", "--shapes", "tiny", "--out", out)
    result = python(*command, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == 15
    assert all(max(case["errors"]) > 0 and "refused" not in case for case in cases.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_bench_refuses_to_speak_without_a_gpu(monkeypatch, capsys):
    import gpu_bench

    monkeypatch.setattr("sys.argv", ["gpu_bench.py"])
    assert gpu_bench.main() != 0
    assert "no CUDA device here; nothing was measured" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- choice, refusals


@pytest.fixture
def a_gpu(monkeypatch):
    """As if there were one, for what is decided before anything is launched, and no native kernels for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    monkeypatch.setattr(backends, "ENVIRONMENT", None)
    monkeypatch.setattr(backends, "_why_no_native_cuda", lambda device: "built without CUDA")
    backends._look_for_triton.cache_clear()
    yield torch.device("cuda", 0)
    backends._look_for_triton.cache_clear()


def test_cuda_tensors_go_to_triton_where_there_are_no_native_kernels(a_gpu):
    assert choose_backend(None, a_gpu) == "triton"
    assert choose_backend("triton", a_gpu, torch.bfloat16, 512) == "triton"


def test_what_triton_cannot_do_goes_to_the_next_backend_or_is_refused(a_gpu, monkeypatch):
    assert choose_backend(None, a_gpu, torch.float64) == "reference"
    assert choose_backend(None, a_gpu, torch.float32, 513) == "reference"
    with pytest.raises(ValueError, match=r"'triton' cannot run on 'cuda:0': .* compute in float32; for float64 use"):
        choose_backend("triton", a_gpu, torch.float64)
    with pytest.raises(ValueError, match="vectors of up to 512 entries, got 513; use backend='native' or"):
        choose_backend("triton", a_gpu, torch.float32, 513)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    backends._look_for_triton.cache_clear()
    assert choose_backend(None, a_gpu) == "reference"
    with pytest.raises(ValueError, match=r"need compute capability 8.0 \(Ampere\), some GPU has less"):
        choose_backend("triton", a_gpu)


@pytest.mark.parametrize(("version", "cure"), [(None, "cannot be imported"), ("3.5.1", "Triton 3.5.1 is too old")])
def test_triton_missing_or_too_old(a_gpu, monkeypatch, version, cure):
    if version is None:
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr(triton, "__version__", version)
    assert choose_backend(None, a_gpu) == "reference"
    with pytest.raises(ValueError, match=f"{cure}.*pip install 'triton>=3.6'"):
        choose_backend("triton", a_gpu)


def test_the_default_on_cpu_tensors_is_not_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "INTERPRET", True)
    monkeypatch.setattr(backends, "ENVIRONMENT", None)
    assert choose_backend(None, torch.device("cpu")) == "native"
    assert why_unavailable("triton", "cpu") is None


@pytest.mark.parametrize(("matrices", "D"), [(2, 4), (1, 600)])
def test_wide_vectors_are_known_by_what_is_summed(monkeypatch, matrices, D):
    """D_out, or D_in where one matrix is for all input capsules."""
    seen = []
    monkeypatch.setattr(backends, "why_unavailable", lambda *arguments: seen.append(arguments))
    fastcaps.dynamic_routing(torch.zeros(1, 2, 600), torch.zeros(matrices, 3, 4, 600), backend="reference")
    assert seen == [("reference", torch.device("cpu"), torch.float32, D)]
