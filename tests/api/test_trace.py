"""routing_trace and CapsuleLayer.trace."""

import pytest
import torch
from support.numerics import Case, backend_op, make_inputs
from torch import nn

import fastcaps
from fastcaps import CapsuleLayer

FIELDS = ("poses", "coupling", "entropy", "agreement", "change")


def test_trace_records_what_the_op_does(implementation):
    backend, device = implementation
    for options in ({}, {"leaky": True}, {"mask": True, "bias": "J"}, {"prior": "BIJ"}, {"eps": 0.1}):
        case = Case(sizes=(5, 20, 6, 4, 8), num_iterations=4, **options)
        inputs = make_inputs(case, torch.float64)
        tensors = {name: x.to(device) for name, x in inputs.tensors.items()}
        mask = None if inputs.mask is None else inputs.mask.to(device)
        keep = {"leaky": case.leaky, "eps": case.eps}
        trace = fastcaps.routing_trace(**tensors, mask=mask, num_iterations=4, **keep)
        outputs = [
            backend_op(backend)(**tensors, mask=mask, num_iterations=t, **keep) for t in range(1, 5)
        ]  # v of every iteration
        torch.testing.assert_close(trace.poses, outputs[-1])
        torch.testing.assert_close(trace.change[0], outputs[0].norm(dim=-1))
        for t in range(1, 4):
            torch.testing.assert_close(trace.change[t], (outputs[t] - outputs[t - 1]).norm(dim=-1))
        assert trace.coupling.shape == trace.agreement.shape == (4, 5, 20, 6)
        assert trace.entropy.shape == (4, 5, 20)
        prior = tensors.get("prior", torch.zeros((), dtype=torch.float64, device=device))
        for t in range(4):
            logits = prior + trace.agreement[:t].sum(0)
            shares = logits.exp() / (logits.exp().sum(-1, keepdim=True) + case.leaky)
            torch.testing.assert_close(trace.coupling[t], shares)
            torch.testing.assert_close(trace.entropy[t], -(shares * shares.log()).sum(-1))
        assert not trace.coupling.requires_grad


def test_trace_in_parts_is_the_whole(monkeypatch):
    inputs = make_inputs(Case(sizes=(5, 20, 6, 4, 8), prior="BIJ"), torch.float64)
    whole = fastcaps.routing_trace(**inputs.tensors)
    monkeypatch.setattr("fastcaps.routing.dynamic.trace.VOTES_AT_ONCE", 2 * 20 * 6 * 8)
    parts = fastcaps.routing_trace(**inputs.tensors)
    for name in FIELDS:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize("share", ["none", "inputs", "both"])
@pytest.mark.parametrize("learn_prior", [False, True])
def test_a_layers_trace_is_the_ops_on_its_parameters(share, learn_prior):
    layer = CapsuleLayer(7, 3, 5, 4, 2, share_weight=share, bias=True, learn_prior=learn_prior, leaky=True, eps=0.1)
    layer = layer.double()
    poses, mask = 3 * torch.randn(6, 7, 3).double(), torch.rand(6, 7) < 0.5
    prior = torch.randn(6, 7, 5).double()
    if learn_prior:
        nn.init.normal_(layer.prior)
    trace = layer.trace(poses, mask=mask, prior=prior, num_iterations=4)
    expected = fastcaps.routing_trace(
        poses, layer.weight.expand(-1, 5, -1, -1), mask=mask, prior=prior + layer.prior if learn_prior else prior,
        bias=layer.bias, num_iterations=4, leaky=True, eps=0.1,
    )  # fmt: skip
    for name in FIELDS:
        assert torch.equal(getattr(trace, name), getattr(expected, name))
    torch.testing.assert_close(trace.poses, layer(poses, mask=mask, prior=prior, num_iterations=4))


def test_a_layers_trace_alone_uses_its_own_iterations_and_prior():
    layer = CapsuleLayer(7, 3, 5, 4, 2, learn_prior=True, backend="reference")
    nn.init.normal_(layer.prior)
    poses = torch.randn(6, 7, 3)
    trace = layer.trace(poses)
    assert trace.coupling.shape == (2, 6, 7, 5)
    torch.testing.assert_close(trace.coupling[0], layer.prior.softmax(-1).expand(6, 7, 5))
    torch.testing.assert_close(trace.poses, layer(poses))


def test_a_layers_trace_refuses_what_forward_refuses():
    layer = CapsuleLayer(7, 3, 5, 4, learn_prior=True)
    with pytest.raises(ValueError, match="prior must broadcast"):
        layer.trace(torch.randn(2, 7, 3), prior=torch.zeros(6))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        layer.trace(torch.randn(2, 7, 3), mask=torch.ones(2, 7))
    with pytest.raises(TypeError, match="only dynamic_routing can be traced"):
        CapsuleLayer(7, 3, 5, 4, routing=lambda poses, weight, num_iterations: poses).trace(torch.randn(2, 7, 3))


def test_a_layers_trace_takes_iterations_by_position_as_in_0_1():
    layer, poses = CapsuleLayer(7, 3, 5, 4), torch.randn(2, 7, 3)
    with pytest.warns(DeprecationWarning, match="num_iterations=") as warned:
        trace = layer.trace(poses, 5)
    assert warned[0].filename == __file__
    assert torch.equal(trace.coupling, layer.trace(poses, num_iterations=5).coupling)
    with (
        pytest.warns(DeprecationWarning, match="is now"),
        pytest.raises(TypeError, match="positional argument"),
    ):
        layer.trace(poses, 5, None)
