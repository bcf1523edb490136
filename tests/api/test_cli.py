"""The command line, the demo, the digits and the timing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcaps import benchmarking, cli
from fastcaps.data import digits

ROOT = Path(__file__).parents[2]


def test_info_names_versions_and_reasons(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch      {torch.__version__.split('+')[0]}" in out
    assert "native     on cpu   can run" in out
    assert "triton     on cpu   the Triton kernels are for CUDA tensors" in out
    assert "reference  on cpu   can run" in out


def test_selftest_prints_every_backend(capsys):
    assert cli.main(["selftest"]) == 0
    out = capsys.readouterr().out
    assert "native     cpu   float32" in out
    assert "reference  cpu   bfloat16" in out


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["demo", "--epochs", "0"], ["demo", "--epochs", "many"]], ids=str
)
def test_bad_arguments_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: fastcaps" in capsys.readouterr().err


def test_demo_in_small(tmp_path, capsys):
    """One epoch: the error is far below chance (90 %), and the pictures are there."""
    assert cli.main(["demo", "--out", str(tmp_path / "pictures"), "--epochs", "1", "--rounds", "0"]) == 0
    out = capsys.readouterr().out
    error = float(out.split("test error ")[-1].split(" %")[0])
    assert error < 60
    for name in ("training", "reconstructions", "coupling", "perturbations"):
        header = (tmp_path / "pictures" / f"{name}.png").read_bytes()[:8]
        assert header == b"\x89PNG\r\n\x1a\n"


def test_digits():
    data = digits()
    assert data.train_images.shape == (1438, 1, 8, 8)
    assert data.test_images.shape == (359, 1, 8, 8)
    assert data.train_images.min() == 0
    assert data.train_images.max() == 1
    assert set(data.test_labels.tolist()) == set(range(data.num_classes))
    again = digits()
    assert torch.equal(data.test_images, again.test_images)
    everything = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # no test digit is among the training digits


@pytest.mark.parametrize("shared", [False, True])
def test_contestants_agree(shared):
    names = ["broadcast", "einsum", "einsum, chunks of 4", "absorbed", "fastcaps", "fastcaps, bfloat16"]
    options = {"shared": shared, "prior": shared, "mask": shared, "half": True, "chunk": 4}
    timings = benchmarking.compare((11, 9, 3, 4, 5), rounds=1, names=names, forms=list(benchmarking.FORMS), **options)
    assert [t.name for t in timings] == names
    for t in timings:
        assert len(t.forward) == len(t.training) == 1
        assert t.refused is None


def test_a_wrong_contestant_is_not_timed(monkeypatch):
    def wrong(num_iterations, backend=None, **options):
        steps = right(num_iterations, backend, **options)
        return {**steps, "fastcaps": lambda x, w, g: 1.01 * steps["fastcaps"](x, w, g)}

    right = benchmarking.contestants
    monkeypatch.setattr(benchmarking, "contestants", wrong)
    refused, admitted = benchmarking.compare((4, 6, 3, 4, 8), rounds=1, names=["einsum", "fastcaps"])[::-1]
    assert refused.forward is None
    assert refused.error == pytest.approx(0.01, rel=0.01)
    assert len(admitted.forward) == 1


def test_table_of_timings(capsys):
    from rich.console import Console

    from fastcaps.demo import print_timings

    slow = benchmarking.Timing("einsum, chunks of 8", [4000.0] * 5, [9000.0] * 5, 1e-7, 2e-7, None, None)
    ours = benchmarking.Timing("fastcaps", [1000.0] * 5, [3000.0] * 5, 1e-7, 3e-7, None, None)
    wrong = benchmarking.Timing("compiled", None, None, 0.01, 0.02, None, "its error is 2.0e-02")
    print_timings([slow, wrong, ours], Console(width=80))
    rows = {line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["fastcaps"] == ["fastcaps", "3e-07", "1000.0", "(1000.0)", "4.00", "3000.0", "(3000.0)", "3.00"]
    assert rows["einsum, chunks of 8"][-4:] == ["1.00", "9000.0", "(9000.0)", "1.00"]
    assert rows["compiled"] == ["compiled", "2e-02", "refused", "refused"]
    assert "not timed: compiled: its error is 2.0e-02" in rows


def test_median_and_percentile():
    assert benchmarking.median_and_p20([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0)


def run_probe(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_probe.py", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_gpu_probe_writes_its_file_and_refuses_to_speak_without_a_gpu(tmp_path):
    out = tmp_path / "probe.json"
    result = run_probe("--device", "cpu", "--only", "machine", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert json.loads(out.read_text())["cases"]["machine"]["torch"] == torch.__version__
    assert run_probe("--device", "cpu", "--only", "nothing").returncode == 2
    if not torch.cuda.is_available():
        result = run_probe()
        assert result.returncode == 1
        assert "no CUDA device here; nothing was measured" in result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the probe's kernels are not compiled")
def test_gpu_probe_kernels_compile(tmp_path):
    for arch in ("sm_80", "sm_90", "sm_100"):
        command = ["nvcc", f"-arch={arch}", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v", "-o"]
        built = subprocess.run(
            [*command, str(tmp_path / "probe.cubin"), str(ROOT / "benchmarks" / "gpu_probe.cu")],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert built.returncode == 0, built.stderr
        assert "0 bytes spill stores" in built.stderr
