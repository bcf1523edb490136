from pathlib import Path

import pytest
import torch
from support.implementations import IMPLEMENTATIONS, MODE, OF_MODE, runs_in, why_not_tested


@pytest.fixture(
    params=[
        pytest.param(pair, marks=getattr(pytest.mark, pair[0]))
        for pair in IMPLEMENTATIONS
        if why_not_tested(*pair) is None
    ],
    ids=lambda pair: f"{pair[0]}-{pair[1]}",
)
def implementation(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device), every pair that can run here; test_backend.py reports the others."""
    return request.param


def pytest_configure(config: pytest.Config) -> None:
    """A process that cannot test what the environment asks for must not look as if it had."""
    if MODE is not None and (reason := why_not_tested(*OF_MODE[MODE])) is not None:
        raise pytest.UsageError(f"the {MODE} kernels cannot be tested here: {reason}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the emulation and in the interpreter: only what is marked for it, without the cases it is too slow for."""
    if MODE is None:
        return
    chosen = [item for item in items if runs_in(MODE, item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture
def wide(implementation: tuple[str, str]) -> torch.dtype:
    """The widest dtype that the implementation computes in; the CUDA kernels by tensor cores know no float64."""
    return torch.float32 if implementation[0] == "triton" or MODE == "emulated" else torch.float64


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
def no_figures(monkeypatch) -> None:
    """A run without its slowest part: no figures for TensorBoard after each epoch, and no report."""
    from fastcaps.train import callbacks, run

    monkeypatch.setattr(callbacks.Pictures, "on_validation_end", lambda *arguments: None)
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
