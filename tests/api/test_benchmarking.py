"""The contest of routing implementations, its table, and the probe of a GPU."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastcaps import benchmarking
from fastcaps.benchmarking import FORMS

ROOT = Path(__file__).parents[2]
SMALL = {"B": 4, "I": 6, "J": 3, "D_in": 4, "D_out": 8}


@pytest.mark.parametrize("shared", [False, True])
def test_contestants_agree(shared):
    names = ["broadcast", "einsum", "einsum, chunks of 4", "absorbed", "fastcaps", "fastcaps, bfloat16"]
    options = {"shared": shared, "prior": shared, "mask": shared, "half": True, "chunk": 4, "forms": list(FORMS)}
    timings = benchmarking.compare(B=11, I=9, J=3, D_in=4, D_out=5, rounds=1, names=names, **options)
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
    refused, admitted = benchmarking.compare(**SMALL, rounds=1, names=["einsum", "fastcaps"])[::-1]
    assert refused.forward is None
    assert refused.error == pytest.approx(0.01, rel=0.01)
    assert len(admitted.forward) == 1


def test_sizes_were_a_tuple_in_0_1():
    with pytest.warns(DeprecationWarning, match="compare: .* is now B=, I=, J=, D_in=, D_out=") as warned:
        (timing,) = benchmarking.compare((4, 6, 3, 4, 8), rounds=1, names=["fastcaps"])
    assert warned[0].filename == __file__
    (again,) = benchmarking.compare(**SMALL, rounds=1, names=["fastcaps"])
    assert (timing.error, timing.gradient_error) == (again.error, again.gradient_error)


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


def test_gpu_probe_writes_its_file_and_refuses_to_speak_without_a_gpu(tmp_path, monkeypatch, capsys):
    import gpu_probe

    def probe(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["gpu_probe.py", *arguments])
        return gpu_probe.main()

    out = tmp_path / "probe.json"
    assert probe("--device", "cpu", "--only", "machine", "--out", str(out)) == 0
    assert json.loads(out.read_text())["cases"]["machine"]["torch"] == torch.__version__
    with pytest.raises(SystemExit) as stop:
        probe("--device", "cpu", "--only", "nothing")
    assert stop.value.code == 2
    if not torch.cuda.is_available():
        assert probe() == 1
        assert "no CUDA device here; nothing was measured" in capsys.readouterr().err


@pytest.mark.static
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the probe's kernels are not compiled")
def test_gpu_probe_kernels_compile(tmp_path):
    for arch in ("sm_80", "sm_90", "sm_100"):
        command = ["nvcc", f"-arch={arch}", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v", "-o"]
        built = subprocess.run(
            [*command, str(tmp_path / "probe.cubin"), str(ROOT / "benchmarks" / "gpu_probe.cu")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert built.returncode == 0, built.stderr
        assert "0 bytes spill stores" in built.stderr
