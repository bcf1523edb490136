"""Masks and priors: what casts no vote, whatever it holds, and what the prior leaves of a softmax."""

import math
from typing import Any

import pytest
import torch
from support.numerics import REGIMES, pairwise, require, small_inputs
from torch import Tensor

from fastcaps.routing import dynamic_routing, route_votes, routing_trace
from fastcaps.routing.conventions import Convention

# Also in the emulation of CUDA and in Triton's interpreter (conftest.py).
pytestmark = [pytest.mark.runs_emulated, pytest.mark.runs_interpreted]

# Where the kernels go other ways: REGIMES, output capsules in several tiles, votes given.
WAYS = [*REGIMES, "tiles", "votes"]
OPTIONS: list[dict[str, Any]] = [{}, {"num_iterations": 1}, {"leaky": True}, {"detach": True}]


def inputs_of(way: str, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Votes, or poses and weight; prior ``[B, I, J]`` and bias."""
    if way in REGIMES:
        return small_inputs(device, dtype, grad=False, regime=way)
    shapes = {"poses": (2, 5, 4), "weight": (5, 60, 16, 4), "prior": (2, 5, 60), "bias": (60, 16)}
    if way == "votes":
        shapes = {"votes": (3, 5, 4, 16), "prior": (3, 5, 4), "bias": (4, 16)}
    return {name: torch.randn(shape, dtype=dtype).to(device) for name, shape in shapes.items()}


def run(inputs: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """The output, and the gradients of all inputs; one that is None counts as 0."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out = (route_votes if "votes" in inputs else dynamic_routing)(**leaves, backend=backend, **options)
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True)
    zeroed = {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(leaves.items(), grads, strict=True)
    }
    return {"output": out.detach(), **zeroed}


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(result[name], value)


# ------------------------------------------------------------------------------------------------- what casts no vote


SILENT = pairwise({"way": WAYS, "options": OPTIONS, "held": ["closed", -math.inf, math.inf, math.nan]})


@pytest.mark.runs_interpreted(unless=lambda choice: choice["options"] or choice["way"] == "tiles")
@pytest.mark.parametrize("choice", SILENT, ids=lambda choice: "-".join(map(str, choice.values())))
def test_what_casts_no_vote_is_as_if_masked(implementation, wide, choice):
    """An input capsule whose routes are all closed; and what a mask hides, whatever its pose and its prior hold."""
    backend, device = implementation
    way, options, held = choice.values()
    inputs = inputs_of(way, device, wide)
    silent = torch.rand(inputs["prior"].shape[:2]).to(device) < 0.4
    silent[0, 0], silent[-1, 0] = True, False
    zeros = {**inputs, "prior": inputs["prior"].masked_fill(silent[..., None], 0.0)}
    expected = run(zeros, backend, mask=~silent, **options)
    first = "votes" if "votes" in inputs else "poses"
    assert (expected[first][silent] == 0).all()
    assert (expected["prior"][silent] == 0).all()
    if held == "closed":
        closed = {**inputs, "prior": inputs["prior"].masked_fill(silent[..., None], -math.inf)}
        assert_same(run(closed, backend, **options), expected)
        return
    filled = {name: x.clone() for name, x in inputs.items()}
    filled["prior"][silent], filled[first][silent] = held, held
    assert_same(run(filled, backend, mask=~silent, **options), expected)


FEW = pytest.mark.runs_interpreted(unless=lambda way: way != "samples")


@FEW
@pytest.mark.parametrize("way", WAYS)
def test_the_lowest_finite_prior_closes_a_route_only_beside_a_larger_one(implementation, wide, way):
    """As in a softmax: many programs mask by this number. Scaled for powers of two it would be -inf."""
    backend, device = implementation
    inputs = inputs_of(way, device, wide)
    lowest = torch.finfo(wide).min
    inputs["prior"][:, 1], inputs["prior"][:, 2, 1:] = lowest, lowest
    assert_same(run(inputs, backend), run(inputs, "reference"))


@FEW
@pytest.mark.parametrize("way", WAYS)
def test_a_masked_input_takes_no_part_in_a_prior_for_all_samples(implementation, wide, way):
    backend, device = implementation
    inputs = inputs_of(way, device, wide)
    inputs["prior"] = inputs["prior"][0]  # [I, J]
    B, I = (inputs["votes"] if "votes" in inputs else inputs["poses"]).shape[:2]
    mask = torch.ones(B, I, dtype=torch.bool, device=device)
    mask[:, 1], mask[0, 2] = False, False
    filled = {**inputs, "prior": inputs["prior"].clone()}
    filled["prior"][1] = math.nan  # masked in all samples
    expected = run({**inputs, "prior": inputs["prior"].clone()}, backend, mask=mask)
    assert (expected["prior"][1] == 0).all()
    assert_same(run(filled, backend, mask=mask), expected)
    filled["prior"][2] = math.nan  # in the first only
    result = run(filled, backend, mask=mask)
    torch.testing.assert_close(result["output"][0], expected["output"][0])
    assert result["output"][1:].isnan().all()


@FEW
@pytest.mark.parametrize("way", WAYS)
def test_a_masked_input_gets_no_gradient_from_a_sample_that_is_not_finite(implementation, wide, way):
    backend, device = implementation
    inputs = inputs_of(way, device, wide)
    first = "votes" if "votes" in inputs else "poses"
    inputs[first][0, 0] = math.nan
    mask = torch.ones(inputs[first].shape[:2], dtype=torch.bool, device=device)
    mask[0, 1] = False
    result = run(inputs, backend, mask=mask)
    assert result["output"][0].isnan().all()
    assert (result[first][0, 1] == 0).all()
    assert (result["prior"][0, 1] == 0).all()
    assert result["prior"][1:].isfinite().all()


@FEW
@pytest.mark.parametrize("way", WAYS)
def test_a_nan_among_closed_routes_stays_one(implementation, wide, way):
    backend, device = implementation
    inputs = inputs_of(way, device, wide)
    inputs["prior"][0, 1] = -math.inf
    inputs["prior"][0, 1, 2] = math.nan
    assert run(inputs, backend)["output"][0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_cast_no_vote_either(implementation, dtype):
    require(implementation, dtype)
    backend, device = implementation
    results = []
    for hidden in (math.nan, 0.0):
        torch.manual_seed(0)
        inputs = closed_and_masked(device, dtype, hidden)
        results.append(run(inputs, backend, mask=inputs.pop("mask").bool()))
    assert_same(*results)


@pytest.mark.runs_interpreted(unless=lambda opened: opened != (25, 28))
@pytest.mark.parametrize("opened", [(0, 3), (25, 28), (57, 60)], ids=str)
def test_whole_tiles_of_closed_routes(implementation, wide, opened):
    """A closed tile has no share, wherever the logits of the others lie."""
    backend, device = implementation
    inputs, opened = inputs_of("tiles", device, wide), slice(*opened)
    few = {
        "poses": inputs["poses"], "weight": inputs["weight"][:, opened],
        "prior": inputs["prior"][..., opened], "bias": inputs["bias"][opened],
    }  # fmt: skip
    expected = run(few, backend, num_iterations=1)
    for shift in (0.0, -400.0):
        prior = torch.full_like(inputs["prior"], -math.inf)
        prior[..., opened] = inputs["prior"][..., opened] + shift
        result = run({**inputs, "prior": prior}, backend, num_iterations=1)
        few_bits = {"rtol": 1e-3, "atol": 1e-3} if shift and wide == torch.float32 else {}  # are left behind the point
        torch.testing.assert_close(result["output"][:, opened], expected["output"], **few_bits)
        torch.testing.assert_close(result["poses"], expected["poses"], **few_bits)
        torch.testing.assert_close(result["weight"][:, opened], expected["weight"], **few_bits)
        assert (result["prior"][prior == -math.inf] == 0).all()


# -------------------------------------------------------------------------------------------------- second derivatives


@pytest.mark.runs_emulated(unless=lambda options: bool(options))
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_gradcheck_with_closed_and_masked_inputs(implementation, options):
    require(implementation, torch.float64)
    backend, device = implementation
    inputs = closed_and_masked(device, torch.float64)
    few = {"poses": (2, 3), "weight": (3, 3), "prior": (2, 3, 3), "bias": (3,), "mask": (2, 3)}  # B = 2, I = J = 3
    inputs = {name: x[tuple(map(slice, few[name]))].clone().requires_grad_() for name, x in inputs.items()}
    mask = inputs.pop("mask").detach().bool()
    assert torch.autograd.gradcheck(
        lambda *x: dynamic_routing(x[0], x[1], prior=x[2], bias=x[3], mask=mask, backend=backend, **options),
        list(inputs.values()),
    )


def test_a_gradient_penalty_sees_neither_closed_nor_masked_inputs(implementation, wide):
    backend, device = implementation
    penalties = []
    for hidden in (math.nan, 0.0):
        torch.manual_seed(1)
        inputs = closed_and_masked(device, wide, hidden)
        mask = inputs.pop("mask").bool()
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        out = dynamic_routing(**leaves, mask=mask, backend=backend)
        gradients = torch.autograd.grad(out.square().sum(), [leaves["poses"], leaves["prior"]], create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        penalties.append(torch.autograd.grad(penalty, list(leaves.values())))
    for ours, expected in zip(*penalties, strict=True):
        assert expected.isfinite().all()
        assert torch.equal(ours, expected)
    assert (penalties[0][2][~mask] == 0).all()


def closed_and_masked(device: str, dtype: torch.dtype, hidden: float = math.nan) -> dict[str, Tensor]:
    """poses, weight, prior and bias, an input closed and another masked, with ``hidden`` under the mask; the mask."""
    inputs = small_inputs(device, dtype, grad=False)
    mask = torch.ones(3, 5, dtype=torch.bool, device=device)
    mask[0, 1] = False
    inputs["prior"][1, 2] = -math.inf
    inputs["prior"][0, 1], inputs["poses"][0, 1] = hidden, hidden
    return {**inputs, "mask": mask.to(dtype)}


# ------------------------------------------------------------------------------------------------ trace and conventions


def test_the_trace_of_closed_and_masked_inputs():
    inputs = closed_and_masked("cpu", torch.float64)
    mask = inputs.pop("mask").bool()
    trace = routing_trace(**inputs, mask=mask)
    assert (trace.coupling[:, 1, 2] == 0).all()  # closed
    assert (trace.coupling[:, 0, 1] == 0.25).all()  # masked: that of a prior of 0
    for value in (trace.poses, trace.coupling, trace.entropy, trace.agreement, trace.change):
        assert value.isfinite().all()
    torch.testing.assert_close(trace.poses, dynamic_routing(**inputs, mask=mask))


@pytest.mark.parametrize("squash", ["norm", "elementwise"])
@pytest.mark.parametrize("logits", ["sample", "batch"])
@pytest.mark.parametrize("softmax", ["outputs", "inputs"])
def test_conventions_leave_closed_inputs_out(softmax, logits, squash):
    inputs = {name: x.float() for name, x in small_inputs(grad=False).items()}
    inputs["prior"] = inputs["prior"][0]
    inputs["prior"][1] = -math.inf  # an input without an open route
    if softmax == "inputs":
        inputs["prior"][:, 2] = -math.inf  # an output that no route leads to
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    out = Convention(softmax, logits, squash)(**leaves)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in leaves.values())
    assert (leaves["poses"].grad[:, 1] == 0).all()
    assert (leaves["weight"].grad[1] == 0).all()


# -------------------------------------------------------------------------------------------------------------- masks


def test_all_rows_masked(implementation):
    backend, device = implementation
    inputs = small_inputs(device, torch.float32)
    del inputs["bias"]
    out = dynamic_routing(**inputs, mask=torch.zeros(3, 5, dtype=torch.bool, device=device), backend=backend)
    out.sum().backward()
    assert (out == 0).all()
    assert all((x.grad == 0).all() for x in inputs.values())


@pytest.mark.parametrize("regime", REGIMES)
def test_a_mask_hides_poses_not_matrices(implementation, wide, regime):
    backend, device = implementation
    inputs = small_inputs(device, wide, grad=False, regime=regime)
    inputs["weight"].view(-1)[4] = math.nan
    mask = torch.ones(inputs["poses"].shape[:2], dtype=torch.bool, device=device)
    mask[:, 0] = False
    out, expected = (dynamic_routing(**inputs, mask=mask, backend=name) for name in (backend, "reference"))
    assert expected.isnan().any()
    torch.testing.assert_close(out, expected, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------- priors


@pytest.mark.parametrize("J", [5, 7, 11])
def test_a_prior_that_is_shifted_changes_nothing(implementation, wide, J):
    """Logits far below 0, all of them: the softmax does not know where 0 is. One iteration, so that none is rounded."""
    backend, device = implementation
    results = []
    for shift in (0.0, -1024.0):
        torch.manual_seed(0)
        poses, weight = (
            torch.randn(3, 5, 3, device=device, dtype=wide),
            torch.randn(5, J, 4, 3, device=device, dtype=wide),
        )
        leaves = [poses.requires_grad_(), weight.requires_grad_()]
        prior = torch.full((J,), shift, device=device, dtype=wide)
        out = dynamic_routing(*leaves, prior=prior, num_iterations=1, backend=backend)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for plain, shifted in zip(*results, strict=True):
        torch.testing.assert_close(
            shifted, plain, rtol=1e-3, atol=1e-3
        )  # a logit of -1024 has few bits behind the point


def test_closed_route_carries_nothing(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide)
    prior = torch.zeros(5, 4, dtype=wide, device=device)
    prior[:, 2] = -math.inf
    out = dynamic_routing(inputs["poses"], inputs["weight"], prior=prior, backend=backend)
    (d_weight,) = torch.autograd.grad(out.sum(), inputs["weight"])
    assert (out[:, 2] == 0).all()
    assert (d_weight[:, 2] == 0).all()
    assert d_weight.isfinite().all()


def test_prior_gets_no_gradient_when_detached(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide)
    out = dynamic_routing(**inputs, detach=True, backend=backend)
    grads = torch.autograd.grad(out.sum(), [inputs["prior"], inputs["bias"]], allow_unused=True)
    assert grads[0] is None
    assert grads[1].abs().max() > 0
