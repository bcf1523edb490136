"""warmup, selftest and the relative error."""

import math

import pytest
import torch
from torch import nn

import fastcaps
from fastcaps import CapsuleLayer, dynamic_routing
from fastcaps.exactness import PIECE, relative_error
from fastcaps.measure import training_cost


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


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (1, 3 * PIECE), (7, 301, 2, 41)])
def test_relative_error_of_all_entries_whatever_their_order(shape):
    order = tuple(reversed(range(len(shape))))
    value, exact = torch.randn(shape, dtype=torch.float64), torch.randn(shape[::-1]).permute(order)
    wanted = (value - exact.double()).norm() / exact.double().norm() if value.numel() else 0.0
    assert relative_error(value, exact) == pytest.approx(float(wanted), rel=1e-12)
    assert relative_error(exact, exact) == relative_error(0 * exact, 0 * exact) == 0
    if value.numel():
        assert relative_error(exact, 0 * exact) == math.inf
        value.view(-1)[-1] = math.nan
        assert not relative_error(value, exact) <= math.inf


def test_relative_error_takes_no_copy_of_a_large_tensor():
    value, exact = torch.randn(20, PIECE, dtype=torch.float64), torch.randn(20, PIECE)
    assert training_cost(lambda: relative_error(value, exact), "cpu", rounds=1).peak < 0.3 * exact.nbytes


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
