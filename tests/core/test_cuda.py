"""The native CUDA backend where there is no GPU: when it is chosen, and how its build fails."""

from pathlib import Path

import pytest
import torch

from fastcaps.routing import backend as backends
from fastcaps.routing.backend import choose_backend, why_unavailable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def a_gpu(monkeypatch):
    """As if there were one, with native kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "ENVIRONMENT", None)
    monkeypatch.setattr(backends, "_why_no_native_cuda", lambda device: None)
    backends._look_for_triton.cache_clear()
    yield torch.device("cuda", 0)
    backends._look_for_triton.cache_clear()


def test_cuda_tensors_go_to_the_native_kernels(a_gpu, monkeypatch):
    assert choose_backend(None, a_gpu) == "native"
    assert choose_backend("native", a_gpu, torch.float64) == "native"
    assert choose_backend(None, a_gpu, torch.float64) == "native"
    assert choose_backend(None, a_gpu, torch.float32, 513) == "native"
    assert choose_backend(None, a_gpu, torch.float32, 4097) == "reference"
    with pytest.raises(ValueError, match="vectors of up to 4096 entries, got 4097"):
        choose_backend("native", a_gpu, torch.float32, 4097)
    monkeypatch.setattr(backends, "_why_no_native_cuda", lambda device: "built without CUDA")
    monkeypatch.setattr(backends, "_warned", True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # there is no Triton where the program runs
    assert choose_backend(None, a_gpu) == "reference"


def test_no_cuda_kernels_and_no_gpu_are_said_with_a_cure(monkeypatch):
    look = backends._look_for_native_cuda.__wrapped__
    monkeypatch.setattr(backends, "EXTENSION_BUILD", "CPU (x86_64), built with torch 2.13.0")
    assert "FASTCAPS_CUDA=1 pip install" in look(torch.device("cuda", 0))
    monkeypatch.undo()
    if not torch.cuda.is_available() and "CUDA" in backends.EXTENSION_BUILD:
        assert why_unavailable("native", "cuda") == "PyTorch sees no CUDA device"
