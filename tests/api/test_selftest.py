"""warmup and selftest."""

import pytest
import torch
from torch import nn

import fastcaps
from fastcaps import CapsuleLayer, dynamic_routing


def test_warmup_runs_every_layer_and_leaves_nothing_behind():
    ran = []

    def counting(poses, weight, **options):
        ran.append((poses.shape, poses.dtype))
        return dynamic_routing(poses, weight, **options)

    network = nn.Sequential(
        CapsuleLayer(7, 3, 5, 4, routing=counting), CapsuleLayer(5, 4, 2, 6, routing=counting, dtype=torch.float64)
    )
    with torch.no_grad():
        fastcaps.warmup(network, batch_size=3)
    assert ran == [((3, 7, 3), torch.float32), ((3, 5, 4), torch.float64)]
    assert all(p.grad is None for p in network.parameters())
    fastcaps.warmup((2, 7, 5, 3, 4), device="cpu", dtype=torch.bfloat16, num_iterations=2)
    fastcaps.warmup(CapsuleLayer(7, 3, 5, 4), dtype=torch.bfloat16)
    with torch.inference_mode():
        fastcaps.warmup((2, 7, 5, 3, 4), device="cpu")
        fastcaps.selftest()
    with pytest.raises(TypeError, match="a module has its own options; not wanted: num_iterations"):
        fastcaps.warmup(network, num_iterations=2)
    with pytest.raises(ValueError, match="J must be at least 1, got 0"):
        fastcaps.warmup((2, 7, 0, 3, 4))
    with pytest.raises(ValueError, match="no CapsuleLayer"):
        fastcaps.warmup(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"\(B, I, J, D_in, D_out\)"):
        fastcaps.warmup((2, 7, 5))


def test_selftest_covers_all_backends_and_can_fail(monkeypatch):
    rows = fastcaps.selftest()
    assert {"native", "reference"} <= {row.backend for row in rows}
    assert all(row.error <= row.budget for row in rows)
    original = fastcaps.exactness.dynamic_routing

    def wrong(*arguments, backend, **options):
        out = original(*arguments, backend=backend, **options)
        return out * 1.0001 if backend == "native" else out

    monkeypatch.setattr(fastcaps.exactness, "dynamic_routing", wrong)
    with pytest.raises(RuntimeError, match=r"wrong numbers.*\n.*backend='native'"):
        fastcaps.selftest()
