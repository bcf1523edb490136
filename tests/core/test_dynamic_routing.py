"""Numbers, shapes and extremes of dynamic_routing and route_votes, the same for every backend and device."""

import math

import pytest
import torch
from support.numerics import (
    CLOSED,
    REGIMES,
    SIZES,
    TILES,
    Case,
    backend_op,
    case_id,
    check,
    make_inputs,
    oracle,
    pairwise,
    pairwise_cases,
    require,
    small_inputs,
)
from torch import Tensor

from fastcaps.exactness import error_budget, relative_error
from fastcaps.functional import squash
from fastcaps.routing import dynamic_routing, route_votes
from fastcaps.routing.dynamic.reference import (
    dynamic_routing_backward_reference,
    dynamic_routing_reference,
    output_capsules,
    transform,
)

# Also in the emulation of CUDA and in Triton's interpreter (conftest.py), there without the cases that take longest.
pytestmark = [pytest.mark.runs_emulated, pytest.mark.runs_interpreted]

CASES = [*pairwise_cases(), *CLOSED]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# ---------------------------------------------------------------------------------------------------------- numbers


def _unusual(case: Case) -> bool:
    return case.sizes != Case().sizes or "expanded" in (case.layout, case.grad_layout)


@pytest.mark.runs_emulated(unless=lambda case, dtype: dtype != torch.float32 and _unusual(case))
@pytest.mark.runs_interpreted(unless=lambda case, dtype: dtype != torch.float32 and case.sizes != Case().sizes)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_numbers(implementation, case, dtype):
    require(implementation, dtype)
    backend, device = implementation
    check(backend_op(backend), case, dtype, device)


@pytest.mark.runs_emulated(unless=lambda num_iterations: num_iterations in (2, 4))
@pytest.mark.runs_interpreted(unless=lambda num_iterations: num_iterations in (2, 4))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("num_iterations", [1, 2, 3, 4, 5])
def test_sizes_and_iterations(implementation, sizes, num_iterations):
    backend, device = implementation
    check(backend_op(backend), Case(sizes=sizes, num_iterations=num_iterations), torch.float32, device)


# Where the native CPU kernels go other ways: votes of a sample beyond the cache, J in several tiles, votes computed
# twice, poses of several vectors, matrices shared over many input capsules.
LARGE = [
    Case(sizes=(2, 1300, 12, 4, 16), num_iterations=2),
    Case(sizes=(3, 40, 210, 3, 16), num_iterations=2),
    Case(sizes=(17, 9, 420, 2, 16), num_iterations=2),
    Case(sizes=(4, 20, 3, 40, 5)),
    Case(sizes=(3, 33, 5, 16, 32), mask=True),
    Case(sizes=(20, 70, 4, 64, 48), share="inputs", prior="IJ", mask=True),
    Case(sizes=(3, 70, 110, 20, 9), share="inputs", prior="BIJ"),
    Case(sizes=(3, 40, 210, 9, 16), votes=True, mask=True),
]


@pytest.mark.runs_emulated(
    unless=lambda case, dtype: (
        dtype == torch.bfloat16
        or case.share == "inputs"
        or case.votes
        or case.sizes[1] == max(c.sizes[1] for c in LARGE)
    )
)
@pytest.mark.runs_interpreted(unless=lambda: True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_large_sizes(implementation, case, dtype):
    backend, device = implementation
    check(backend_op(backend), case, dtype, device)


# Where the native CPU kernels keep the votes: one and several chunks of samples, rows that do not fill their vectors,
# tasks that share an input capsule, few samples, each gradient alone.
LARGE_MATRICES = [
    Case(sizes=(23, 7, 5, 67, 13), prior="IJ", bias="J", mask=True),
    Case(sizes=(131, 3, 3, 101, 19), prior="BIJ", leaky=True, grad_layout="strided"),
    Case(sizes=(131, 2, 3, 97, 2), prior="IJ", bias="1", num_iterations=2, layout="strided"),
    Case(sizes=(17, 1, 11, 128, 64), detach=True, eps=1e-2),
    Case(sizes=(5, 3, 37, 29, 41), share="outputs", prior="BIJ", mask=True),
    Case(sizes=(7, 40, 3, 211, 1), num_iterations=5, grad_layout="expanded"),
]


@pytest.mark.runs_emulated(unless=lambda: True)
@pytest.mark.runs_interpreted(unless=lambda: True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE_MATRICES, ids=case_id)
def test_large_matrices(implementation, case, dtype):
    require(implementation, dtype)
    backend, device = implementation
    check(backend_op(backend), case, dtype, device)


@pytest.mark.parametrize("case", TILES, ids=case_id)
def test_tiles(implementation, case):
    backend, device = implementation
    check(backend_op(backend), case, torch.float32, device)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_reference_is_the_papers_procedure(case):
    inputs = make_inputs(case, torch.float64)
    arrays = {name: x.numpy() for name, x in inputs.tensors.items()}
    mask = None if inputs.mask is None else inputs.mask.numpy()
    expected, _ = oracle(**arrays, mask=mask, **case.options)
    result = inputs.call(**inputs.tensors, mask=inputs.mask, **case.options, backend="reference")
    torch.testing.assert_close(result, torch.from_numpy(expected))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_backward_from_the_sums_alone_is_the_gradient(case):
    inputs = make_inputs(case, torch.float64)
    tensors = dict(inputs.tensors)
    poses, weight = tensors.get("votes", tensors.get("poses")), tensors.get("weight")
    prior, bias = tensors.get("prior"), tensors.get("bias")
    J = output_capsules(poses, weight, prior, bias)
    if prior is not None and prior.dim() < 3:
        prior = prior.expand(poses.shape[1], J)
    if prior is not None and prior.dim() == 3:
        prior = prior.expand(poses.shape[0], poses.shape[1], J)
    bias = None if bias is None else bias.expand(J, -1)
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (poses, weight, prior, bias)]
    out = dynamic_routing_reference(*leaves, **case.options)
    wanted = [x for x in leaves if x is not None]
    expected = torch.autograd.grad(out, wanted, inputs.grad, allow_unused=True)
    sums = torch.stack([_sums(leaves, case, T) for T in range(1, case.num_iterations + 1)]).detach()
    options = {name: case.options[name] for name in ("leaky", "detach", "eps")}
    result = dynamic_routing_backward_reference(
        inputs.grad, *(None if x is None else x.detach() for x in leaves), sums, **options
    )
    for x, e, r in zip(wanted, expected, [r for r in result if r is not None], strict=True):
        torch.testing.assert_close(r, torch.zeros_like(x) if e is None else e)


def _sums(leaves, case: Case, T: int) -> Tensor:
    """s_{T-1} of the first T iterations, from v = squash(s): the inverse of squash is exact enough for no one, so the
    sum is taken again with the coupling that T - 1 iterations lead to."""
    poses, weight, prior, bias = leaves
    J = output_capsules(poses, weight, prior, bias)
    u = transform(poses, weight).expand(-1, -1, J, -1)
    logits = u.new_zeros(u.shape[:3]) if prior is None else prior.expand(u.shape[:3])
    for t in range(1, T):
        v = dynamic_routing_reference(*leaves, **{**case.options, "num_iterations": t})
        logits = logits + (u * v[:, None]).sum(-1)
    if case.leaky:
        logits = torch.cat([logits, logits.new_zeros(*logits.shape[:2], 1)], -1)
    c = logits.softmax(-1)[..., :J].nan_to_num(0.0)  # closed inputs
    s = (c[..., None] * u).sum(1)
    return s if bias is None else s + bias


# No detach here: numerical differences see the coupling move. test_detached_gradient has a check of its own.
@pytest.mark.runs_emulated(unless=lambda options: "leaky" in options)
@pytest.mark.parametrize(
    "options", [{}, {"leaky": True, "num_iterations": 4}, {"eps": 0.1}, {"num_iterations": 1}], ids=str
)
def test_gradcheck(implementation, options):
    require(implementation, torch.float64)
    backend, device = implementation
    inputs = small_inputs(device)
    assert torch.autograd.gradcheck(
        lambda *x: dynamic_routing(x[0], x[1], prior=x[2], bias=x[3], backend=backend, **options),
        list(inputs.values()),
    )


def test_detached_gradient_is_that_of_the_last_sum_with_constant_coupling(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide)
    arrays = {name: x.detach().double().cpu().numpy() for name, x in inputs.items()}
    c = torch.from_numpy(oracle(**arrays)[1]).to(device, wide)
    u = torch.einsum("ijdk,bik->bijd", inputs["weight"], inputs["poses"])
    expected = squash((c[..., None] * u).sum(1) + inputs["bias"])
    result = dynamic_routing(**inputs, detach=True, backend=backend)
    grad = torch.randn_like(result)
    leaves = [inputs["poses"], inputs["weight"], inputs["bias"]]
    torch.testing.assert_close(result, expected)
    pairs = zip(torch.autograd.grad(result, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    for ours, exact in pairs:
        torch.testing.assert_close(ours, exact)


def test_gradcheck_votes(implementation):
    require(implementation, torch.float64)
    backend, device = implementation
    votes = (2 * torch.randn(2, 4, 3, 2, dtype=torch.float64)).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: route_votes(u, backend=backend), votes)


@pytest.mark.runs_emulated(unless=lambda: True)
@pytest.mark.parametrize("options", [{}, {"leaky": True}, {"eps": 0.1}], ids=str)
def test_gradgradcheck(implementation, options):
    require(implementation, torch.float64)
    backend, device = implementation
    shapes = [(2, 3, 2), (3, 2, 2, 2), (2, 3, 2), (2, 2)]
    x = [(2 * torch.randn(shape, dtype=torch.float64)).to(device).requires_grad_() for shape in shapes]
    assert torch.autograd.gradgradcheck(
        lambda *x: dynamic_routing(x[0], x[1], prior=x[2], bias=x[3], num_iterations=2, backend=backend, **options), x
    )


def test_gradient_penalty_is_the_reference_s(implementation, wide):
    backend, device = implementation
    penalties = []
    for name, dtype in ((backend, wide), ("reference", wide), ("reference", torch.float64)):
        torch.manual_seed(1)
        inputs = {n: x.to(dtype).requires_grad_() for n, x in small_inputs(device, wide, grad=False).items()}
        out = dynamic_routing(**inputs, backend=name)
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs["poses"], create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), list(inputs.values())))
    for ours, reference, exact in zip(*penalties, strict=True):
        assert exact.abs().max() > 0
        if wide == torch.float64:
            torch.testing.assert_close(ours, exact)
        else:
            budget = error_budget(wide, relative_error(reference, exact), gradient=True)
            assert relative_error(ours, exact) <= budget


# --------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("sizes", [(0, 5, 4, 3, 2), (3, 0, 4, 3, 2), (0, 0, 4, 3, 2)], ids=str)
def test_empty(implementation, sizes):
    backend, device = implementation
    B, I, J, D_in, D_out = sizes
    poses = torch.randn(B, I, D_in, device=device, requires_grad=True)
    weight = torch.randn(I, J, D_out, D_in, device=device, requires_grad=True)
    bias = torch.randn(J, D_out, device=device, requires_grad=True)
    out = dynamic_routing(poses, weight, bias=bias, backend=backend)
    out.sum().backward()
    n = bias.norm(dim=1, keepdim=True)
    torch.testing.assert_close(out, (bias * n / (1 + n * n)).expand(B, J, D_out))
    assert poses.grad.shape == poses.shape
    assert weight.grad.shape == weight.shape
    assert (weight.grad == 0).all()
    votes = torch.randn(B, I, J, D_out, device=device, requires_grad=True)
    route_votes(votes, backend=backend).sum().backward()
    assert votes.grad.shape == votes.shape


@pytest.mark.parametrize("detach", [False, True])
def test_zero_capsules_and_zero_weights_have_finite_gradients(implementation, detach):
    backend, device = implementation
    for zero in ("poses", "weight", "both"):
        inputs = small_inputs(device, torch.float32, grad=False)
        del inputs["bias"], inputs["prior"]
        for name in inputs:
            if zero in (name, "both"):
                inputs[name] = torch.zeros_like(inputs[name])
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        out = dynamic_routing(**leaves, detach=detach, backend=backend)
        grads = torch.autograd.grad(out.sum(), list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()), allow_unused=True)
        assert (out == 0).all()
        assert all((g == 0).all() for g in grads)
        assert all((g == 0).all() for g in second if g is not None)


def test_one_dead_output_capsule_among_living_ones(implementation):
    backend, device = implementation
    inputs = small_inputs(device, torch.float32, grad=False)
    inputs["weight"][:, 1] = 0
    inputs["bias"][1] = 0
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    out = dynamic_routing(**leaves, backend=backend)
    out.sum().backward()
    assert (out[:, 1] == 0).all()
    assert (out[:, 0] != 0).all()
    assert all(x.grad.isfinite().all() for x in leaves.values())


def test_huge_inputs_stay_finite(implementation, wide):
    backend, device = implementation
    for dtype in {torch.float32, wide}:
        inputs = {n: (100 * x).detach().requires_grad_() for n, x in small_inputs(device, dtype, grad=False).items()}
        out = dynamic_routing(**inputs, num_iterations=10, backend=backend)
        out.sum().backward()
        assert out.isfinite().all()
        assert all(x.grad.isfinite().all() for x in inputs.values())
        assert (out.norm(dim=-1) <= 1 + 1e-6).all()


@pytest.mark.parametrize(("scale", "eps"), [(1e9, 0.0), (1e8, 1e-8)])
def test_huge_sums_have_exact_gradients(implementation, scale, eps):
    """Sums whose squares are far from overflow, but not the squares of their squares."""
    backend, device = implementation
    inputs = small_inputs(device, torch.float32, grad=False)
    grads = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        poses = (scale * inputs["poses"]).to(dtype).requires_grad_()
        weight = inputs["weight"].to(dtype).requires_grad_()
        out = dynamic_routing(poses, weight, eps=eps, backend=name)
        grads.append(torch.autograd.grad(out.sum(), [poses, weight]))
    for ours, exact in zip(*grads, strict=True):
        assert relative_error(ours, exact) <= error_budget(torch.float32, 0.0, gradient=True)


@pytest.mark.parametrize("eps", [1e-38, 1e-32, 1e-8])
def test_zero_capsules_with_a_small_eps(implementation, eps):
    backend, device = implementation
    poses = torch.zeros(2, 5, 3, device=device, requires_grad=True)
    weight = torch.randn(5, 4, 2, 3, device=device, requires_grad=True)
    out = dynamic_routing(poses, weight, eps=eps, backend=backend)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), [poses, weight]))


NON_FINITE = pairwise(
    {
        "filler": [math.nan, math.inf, -math.inf],
        "where": ["poses", "weight", "prior", "bias"],
        "num_iterations": [1, 3],
        "leaky": [False, True],
        "regime": REGIMES,
    }
)


@pytest.mark.parametrize("choice", NON_FINITE, ids=lambda choice: "-".join(map(str, choice.values())))
def test_non_finite_where_the_reference_is(implementation, wide, choice):
    filler, where, num_iterations, leaky, regime = choice.values()
    backend, device = implementation
    inputs = small_inputs(device, wide, grad=False, regime=regime)
    inputs[where].view(-1)[4] = filler
    kwargs = {"num_iterations": num_iterations, "leaky": leaky}
    results = []
    for name in (backend, "reference"):
        leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
        out = dynamic_routing(**leaves, **kwargs, backend=name)
        results.append([out, *torch.autograd.grad(out.sum(), list(leaves.values()))])
    for result, expected in zip(*results, strict=True):
        # NaN and infinity in the same places; of other numbers in float32 a few digits, as test_numbers looks at them.
        few = {} if wide == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(result, expected, **few, equal_nan=True)


@pytest.mark.parametrize("given", ["weight", "votes"])
def test_expanded_over_the_output_capsules(implementation, wide, given):
    """A stride of 0 is not the same as a size of 1: the gradient has the size."""
    backend, device = implementation
    shape = (5, 1, 4, 3) if given == "weight" else (3, 5, 1, 4)
    one = torch.randn(shape, device=device, dtype=wide)
    poses = torch.randn(3, 5, 3, device=device, dtype=wide)
    prior = torch.randn(5, 6, device=device, dtype=wide)
    results = []
    for many in (
        (one.expand(-1, 6, -1, -1), one.repeat(1, 6, 1, 1))
        if given == "weight"
        else (
            one.expand(-1, -1, 6, -1),
            one.repeat(1, 1, 6, 1),
        )
    ):
        leaf = many.detach().requires_grad_()
        op = dynamic_routing if given == "weight" else route_votes
        out = op(*([poses] if given == "weight" else []), leaf, prior=prior, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
    for expanded, repeated in zip(*results, strict=True):
        assert expanded.shape == repeated.shape
        torch.testing.assert_close(expanded, repeated)


def test_weight_shared_over_outputs_alone_makes_them_equal(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide)
    weight = inputs["weight"][:, :1]
    out = dynamic_routing(inputs["poses"], weight, prior=torch.zeros(4, dtype=wide, device=device), backend=backend)
    assert out.shape == (3, 4, 2)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    assert dynamic_routing(inputs["poses"], weight, backend=backend).shape == (3, 1, 2)
