"""The tests themselves are tested: a twin of the op with one deliberate mistake, per option, must fail ``check``."""

import math
from typing import Any

import pytest
import torch
from support.numerics import Case, case_id, check, pairwise_cases
from torch import Tensor

from fastcaps.functional import compute_dtype, squash
from fastcaps.routing import route_votes

DEFAULT = Case(sizes=(5, 20, 6, 4, 8))

# name of the mistake -> a case whose option it breaks
MISTAKES: dict[str, dict[str, Any]] = {
    "one iteration less": {},
    "one iteration more": {},
    "softmax over the input capsules": {},
    "logits averaged over the batch": {},
    "logits not accumulated": {},
    "squash without its square": {},
    "norm over the whole tensor": {},
    "weight transposed": {"sizes": (5, 20, 6, 4, 4)},
    "last input capsule forgotten": {},
    "last sample gets the first one's output": {},
    "gradient of the last iteration only": {},
    "full gradient although detached": {"detach": True},
    "votes detached with the coupling": {"detach": True, "bias": "J"},
    "gradient not passed through squash": {},
    "prior ignored": {"prior": "IJ"},
    "prior added in every iteration": {"prior": "IJ"},
    "prior without gradient": {"prior": "BIJ"},
    "prior of the first sample for all": {"prior": "BIJ"},
    "infinite prior clamped": {"prior": "closed", "num_iterations": 2},
    "closed inputs vote for all alike": {"prior": "closed inputs"},
    "closed inputs make NaN": {"prior": "closed inputs"},
    "bias ignored": {"bias": "J"},
    "bias in the last iteration only": {"bias": "J"},
    "bias before the first iteration only": {"bias": "J"},
    "bias of the first capsule for all": {"bias": "J"},
    "mask ignored": {"mask": True},
    "mask closes routes instead": {"mask": True},  # a softmax over equally closed routes votes after all
    "masked slots keep their gradient": {"mask": True},
    "leaky ignored": {"leaky": True},
    "leaky share kept by the others": {"leaky": True},
    "leaky logit of one": {"leaky": True},
    "eps ignored": {"eps": 1e-2},
    "eps added outside the root": {"eps": 1e-2},
    "weight shared over inputs: gradient of one input": {"share": "inputs"},
    "weight shared over outputs: gradient of one output": {"share": "outputs", "prior": "IJ"},
    "strides of the poses ignored": {"layout": "strided"},
    "strides of the incoming gradient ignored": {"grad_layout": "expanded"},
    "inputs rounded to 10 bits, as tf32 does": {},
}


class IgnoresStrides(torch.autograd.Function):
    """Reads the memory of a tensor (``which`` = input) or of the incoming gradient as if it were contiguous."""

    @staticmethod
    def forward(ctx, x, which):
        ctx.which = which
        return memory_of(x) if which == "input" else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (memory_of(grad) if ctx.which == "gradient" else grad), None


def memory_of(x: Tensor) -> Tensor:
    raw = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())[x.storage_offset() :]
    return raw.repeat(math.ceil(x.numel() / raw.numel()))[: x.numel()].reshape(x.shape).nan_to_num(7.0)


def twin(
    wrong: str | None,
    *,
    poses: Tensor,
    weight: Tensor,
    num_iterations: int = 3,
    prior: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    leaky: bool = False,
    detach: bool = False,
    eps: float = 0.0,
) -> Tensor:
    """The op in einsums, with the mistake named ``wrong`` (None: right)."""
    dtype = poses.dtype
    x, W, prior, bias = (t if t is None else t.to(compute_dtype(dtype)) for t in (poses, weight, prior, bias))
    if wrong == "strides of the poses ignored":
        x = IgnoresStrides.apply(x, "input")
    if wrong == "inputs rounded to 10 bits, as tf32 does":
        x = x + (x.half().to(x.dtype) - x).detach()
    if mask is not None and wrong not in ("mask ignored", "mask closes routes instead"):
        kept = x * mask[..., None]
        x = kept.detach() + (x - x.detach()) if wrong == "masked slots keep their gradient" else kept
    I = x.shape[1]
    J = max(t.shape[a] for t, a in ((W, 1), (prior, -1), (bias, 0)) if t is not None)
    if wrong == "weight shared over inputs: gradient of one input":
        W = torch.cat([W, W.detach().expand(I - 1, -1, -1, -1)])
    if wrong == "weight shared over outputs: gradient of one output":
        W = torch.cat([W, W.detach().expand(-1, J - 1, -1, -1)], 1)
    W = W.expand(I, J, -1, -1)
    u = torch.einsum("ijkd,bik->bijd" if wrong == "weight transposed" else "ijdk,bik->bijd", W, x)
    if wrong == "last input capsule forgotten":
        u = torch.cat([u[:, :-1], 0 * u[:, -1:]], 1)

    b0 = u.new_zeros(u.shape[:-1])
    if prior is not None and wrong != "prior ignored":
        prior = prior.detach() if wrong == "prior without gradient" else prior
        prior = prior.clamp(min=-3.0) if wrong == "infinite prior clamped" else prior
        b0 = b0 + (prior[:1] if wrong == "prior of the first sample for all" else prior)
    if mask is not None and wrong == "mask closes routes instead":
        b0 = b0.masked_fill(~mask[..., None], -1e9)
    if bias is not None and wrong == "bias of the first capsule for all":
        bias = bias[:1]

    T = num_iterations + {"one iteration less": -1, "one iteration more": 1}.get(wrong or "", 0)
    constant = detach and wrong != "full gradient although detached"
    logits = b0
    for t in range(T):
        last = t == T - 1
        if constant or (wrong == "gradient of the last iteration only" and last):
            logits = logits.detach()
        c = share(logits, leaky, wrong)
        s = torch.einsum("bij,bijd->bjd", c, u.detach() if wrong == "votes detached with the coupling" else u)
        skip = {"bias ignored": True, "bias in the last iteration only": not last}
        skip["bias before the first iteration only"] = t > 0
        if bias is not None and not skip.get(wrong or "", False):
            s = s + bias
        v = shrink(s, eps, wrong)
        agreement = torch.einsum("bijd,bjd->bij", u, v)
        if wrong == "logits averaged over the batch":
            agreement = agreement.mean(0, keepdim=True).expand_as(agreement)
        logits = (b0 if wrong == "logits not accumulated" else logits) + agreement
        if prior is not None and wrong == "prior added in every iteration":
            logits = logits + prior
    if wrong == "last sample gets the first one's output":
        v = torch.cat([v[:-1], v[:1]])
    if wrong == "strides of the incoming gradient ignored":
        v = IgnoresStrides.apply(v, "gradient")
    return v.to(dtype)


def share(logits: Tensor, leaky: bool, wrong: str | None) -> Tensor:
    if wrong == "softmax over the input capsules":
        return logits.softmax(1)
    if not leaky or wrong == "leaky ignored":
        if wrong == "closed inputs make NaN":
            return logits.softmax(-1)
        closed = logits.isneginf().all(-1, keepdim=True)
        c = torch.where(closed, 0.0, logits).softmax(-1)
        return c if wrong == "closed inputs vote for all alike" else torch.where(closed, 0.0, c)
    extra = torch.ones_like if wrong == "leaky logit of one" else torch.zeros_like
    c = torch.cat([logits, extra(logits[..., :1])], -1).softmax(-1)[..., :-1]
    return c / c.sum(-1, keepdim=True) if wrong == "leaky share kept by the others" else c


def shrink(s: Tensor, eps: float, wrong: str | None) -> Tensor:
    if wrong == "norm over the whole tensor":
        return s * (s.norm() / (1 + s.norm() ** 2))
    if wrong == "squash without its square":
        return s / (1 + s.square().sum(-1, keepdim=True))
    if wrong == "eps ignored":
        return squash(s)
    if wrong == "eps added outside the root":
        n = s.norm(dim=-1, keepdim=True)
        return s * n**2 / ((1 + n**2) * (n + eps))
    v = squash(s, eps=eps)
    return v.detach() + (s - s.detach()) if wrong == "gradient not passed through squash" else v


def op(wrong: str | None):
    return lambda **arguments: twin(wrong, **arguments)


RIGHT = [case for case in pairwise_cases() if not case.votes]


@pytest.mark.parametrize("case", RIGHT, ids=case_id)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_right_twin_passes(case, dtype):
    check(op(None), case, dtype)


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_wrong_twin_fails(wrong):
    case = Case(**{"sizes": DEFAULT.sizes, **MISTAKES[wrong]})
    check(op(None), case, torch.float32)
    with pytest.raises(AssertionError, match=r"relative error|an entry is off|has shape"):
        check(op(wrong), case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_computing_in_the_half_type_fails(dtype):
    def rounds_inside(*, poses, weight, num_iterations, mask, **options):
        u = torch.einsum("ijdk,bik->bijd", weight, poses)
        logits = torch.zeros_like(u[..., 0])
        for _ in range(num_iterations):
            v = squash(torch.einsum("bij,bijd->bjd", logits.softmax(-1), u))
            logits = logits + torch.einsum("bijd,bjd->bij", u, v)
        return v

    with pytest.raises(AssertionError, match="relative error"):
        check(rounds_inside, DEFAULT, dtype)


@pytest.mark.parametrize("tensor", ["output", "poses", "weight"])
def test_one_wrong_entry_in_a_thousand_fails(tensor):
    """A single entry that is off by a thousandth of the largest one: what a missing tail of a tile looks like."""

    def spoil(x: Tensor) -> Tensor:
        spot = torch.zeros_like(x)
        spot.view(-1)[-1] = 1e-3 * x.detach().abs().max()
        return spot

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.contiguous()
            return grad + spoil(grad)

    def wrong(**arguments: Any) -> Tensor:
        if tensor != "output":
            arguments[tensor] = Spoil.apply(arguments[tensor])
        out = twin(None, **arguments)
        return out + spoil(out) if tensor == "output" else out

    with pytest.raises(AssertionError, match=f"^{tensor}"):
        check(wrong, DEFAULT, torch.float32)


VOTES_MISTAKES = {
    "votes of the next sample": lambda u: u.roll(1, 0),
    "output capsules reversed": lambda u: u.flip(2),
    "last input capsule forgotten": lambda u: torch.cat([u[:, :-1], 0 * u[:, -1:]], 1),
    "gradient halved": lambda u: u.detach() + (u - u.detach()) / 2,
}


@pytest.mark.parametrize("wrong", VOTES_MISTAKES)
def test_wrong_votes_fail(wrong):
    case = Case(sizes=DEFAULT.sizes, votes=True)
    check(lambda votes, **x: route_votes(votes, **x), case, torch.float32)
    with pytest.raises(AssertionError, match="relative error"):
        check(lambda votes, **x: route_votes(VOTES_MISTAKES[wrong](votes), **x), case, torch.float32)
