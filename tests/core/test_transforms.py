"""The transforms of torch.func, and differentiation in forward mode, on every backend and device."""

import pytest
import torch
from support.numerics import small_inputs
from torch import Tensor

from fastcaps.routing import dynamic_routing


def test_vmap_folds_into_the_batch(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide, grad=False)
    stacked = torch.randn(4, 3, 5, 3, dtype=wide, device=device)
    priors = torch.randn(5, 4, 4, dtype=wide, device=device)  # mapped axis 1: [I, N, J]

    def op(poses: Tensor, prior: Tensor) -> Tensor:
        return dynamic_routing(poses, inputs["weight"], prior=prior, bias=inputs["bias"], backend=backend)

    result = torch.func.vmap(op, in_dims=(0, 1))(stacked, priors)
    expected = torch.stack([op(stacked[n], priors[:, n]) for n in range(4)])
    torch.testing.assert_close(result, expected)
    result = torch.func.vmap(op, in_dims=(0, None))(stacked, inputs["prior"])
    torch.testing.assert_close(result, torch.stack([op(poses, inputs["prior"]) for poses in stacked]))
    result = torch.func.vmap(op, in_dims=(None, 1))(inputs["poses"], priors)
    torch.testing.assert_close(result, torch.stack([op(inputs["poses"], priors[:, n]) for n in range(4)]))
    masks = torch.rand(4, 3, 5, device=device) < 0.5
    masked = lambda poses, mask: dynamic_routing(poses, inputs["weight"], mask=mask, backend=backend)  # noqa: E731
    result = torch.func.vmap(masked)(stacked, masks)
    torch.testing.assert_close(result, torch.stack([masked(stacked[n], masks[n]) for n in range(4)]))


def test_functional_gradients(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide, grad=False)
    stacked = torch.randn(4, 3, 5, 3, dtype=wide, device=device)

    def loss(weight: Tensor, poses: Tensor, backend: str = backend) -> Tensor:
        return dynamic_routing(poses, weight, backend=backend).sin().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(inputs["weight"], stacked)
    for n in range(4):
        expected = torch.func.grad(lambda w, n=n: loss(w, stacked[n], "reference"))(inputs["weight"])
        torch.testing.assert_close(per_sample[n], expected)
    total = torch.func.grad(lambda w: torch.func.vmap(lambda x: loss(w, x))(stacked).sum())(inputs["weight"])
    torch.testing.assert_close(total, per_sample.sum(0))


@pytest.mark.parametrize("mapped", [("weight",), ("bias",), ("weight", "bias", "poses", "prior")], ids=str)
def test_vmap_over_the_weight_or_bias(implementation, wide, mapped):
    """An ensemble: values, and the gradients of all its members."""
    backend, device = implementation
    inputs = small_inputs(device, wide, grad=False)
    stacked = {name: torch.stack([x, 0.5 * x]) if name in mapped else x for name, x in inputs.items()}
    dims = {name: 0 if name in mapped else None for name in inputs}

    def op(x: dict[str, Tensor]) -> Tensor:
        return dynamic_routing(**x, backend=backend)

    def members(x: dict[str, Tensor]) -> Tensor:
        return torch.stack([op({name: v[n] if name in mapped else v for name, v in x.items()}) for n in range(2)])

    mapped_op = torch.func.vmap(op, in_dims=(dims,))
    torch.testing.assert_close(mapped_op(stacked), members(stacked))
    gradients, expected = (torch.func.grad(lambda x, f=f: f(x).sin().sum())(stacked) for f in (mapped_op, members))
    for name in inputs:
        torch.testing.assert_close(gradients[name], expected[name])


@pytest.mark.parametrize("options", [{}, {"leaky": True}, {"detach": True}], ids=str)
def test_forward_mode(implementation, wide, options):
    """jvp, jacfwd, hessian and dual tensors are those of the reference, on every backend."""
    backend, device = implementation
    inputs = small_inputs(device, wide, grad=False)
    values, tangents = tuple(inputs.values()), tuple(torch.randn_like(x) for x in inputs.values())

    def op(poses: Tensor, weight: Tensor, prior: Tensor, bias: Tensor, backend: str = backend) -> Tensor:
        return dynamic_routing(poses, weight, prior=prior, bias=bias, backend=backend, **options)

    def reference(*x: Tensor) -> Tensor:
        return op(*x, backend="reference")

    for ours, expected in zip(
        torch.func.jvp(op, values, tangents), torch.func.jvp(reference, values, tangents), strict=True
    ):
        torch.testing.assert_close(ours, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = op(*map(torch.autograd.forward_ad.make_dual, values, tangents))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(reference, values, tangents)[1])
    for argument in (0, 1):
        jacobian = torch.func.jacfwd(op, argnums=argument)(*values)
        torch.testing.assert_close(jacobian, torch.func.jacrev(reference, argnums=argument)(*values))
    curvature = torch.func.hessian(lambda *x: op(*x).sin().sum())(*values)
    expected = torch.func.jacrev(torch.func.jacrev(lambda *x: reference(*x).sin().sum()))(*values)
    torch.testing.assert_close(curvature, expected)
