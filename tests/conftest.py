from pathlib import Path

import pytest
import torch
from support import emulated_cuda

from fastcaps.routing.backend import BACKENDS, why_unavailable
from fastcaps.routing.dynamic import ops

if emulated_cuda.WANTED:  # the native kernels are those for CUDA, on CPU tensors
    ops.op = lambda backend, direction: getattr(emulated_cuda, direction)


def why_not_tested(backend: str, device: str) -> str | None:
    """Why a backend is not tested on a device here, or None where it is."""
    if emulated_cuda.WANTED and (backend, device) != ("native", "cpu"):
        return "only the emulated CUDA kernels are tested"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return why_unavailable(backend, device)


IMPLEMENTATIONS = [(backend, device) for device in ("cpu", "cuda") for backend in BACKENDS]


@pytest.fixture(
    params=[pair for pair in IMPLEMENTATIONS if why_not_tested(*pair) is None], ids=lambda pair: f"{pair[0]}-{pair[1]}"
)
def implementation(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device), every pair that can run here; test_backend.py reports the others."""
    return request.param


@pytest.fixture
def wide(implementation: tuple[str, str]) -> torch.dtype:
    """The widest dtype that the implementation computes in; the CUDA kernels by tensor cores know no float64."""
    return torch.float32 if implementation[0] == "triton" or emulated_cuda.WANTED else torch.float64


@pytest.fixture(autouse=True)
def reproducible():
    """A seed per test, uninitialised memory full of NaN, true float32, no compiled code from another test."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    from support.training_runs import SMALL, train

    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(out, *SMALL) == 0
    return out


@pytest.fixture
def no_report(monkeypatch) -> None:
    """A run without its slowest part."""
    from fastcaps.train import run

    monkeypatch.setattr(run, "write_report", lambda out: None)


@pytest.fixture
def colours(tmp_path) -> Path:
    from PIL import Image

    for part, count in (("train", 12), ("test", 4)):
        for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (20, 18), colour).save(tmp_path / "images" / part / name / f"{n}.png")
    return tmp_path / "images"
