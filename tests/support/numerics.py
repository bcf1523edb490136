"""How numbers are judged: cases, inputs, an independent oracle in numpy, and the comparison with float64.

The error budgets are those of ``fastcaps.selftest`` (``fastcaps.exactness.error_budget``); no test has its own.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcaps.exactness import error_budget
from fastcaps.functional import compute_dtype
from fastcaps.routing import dynamic_routing, route_votes
from fastcaps.routing.backend import INTERPRET

# B, I, J, D_in, D_out: the paper's pose sizes, single capsules, odd and prime sizes, few samples and more than a tile.
SIZES = [(19, 40, 10, 8, 16), (3, 17, 5, 7, 11), (2, 1, 3, 4, 6), (8, 13, 2, 1, 1), (1, 33, 4, 5, 3), (37, 7, 6, 3, 2)]
if INTERPRET:  # an input capsule takes milliseconds there
    SIZES = [(min(B, 19), min(I, 4), J, D_in, D_out) for B, I, J, D_in, D_out in SIZES]


@dataclass(frozen=True)
class Case:
    """One call of the op: sizes, options and the layout of its tensors."""

    sizes: tuple[int, int, int, int, int] = SIZES[0]
    share: str = "none"  # which axes of weight are 1: none, inputs, outputs, both
    prior: str = "none"  # none, J, IJ, BIJ, B1J, closed (IJ with -inf), closed inputs (BIJ with rows of -inf)
    bias: str = "none"  # none, J, 1
    mask: bool = False
    num_iterations: int = 3
    leaky: bool = False
    detach: bool = False
    eps: float = 0.0
    layout: str = "contiguous"  # of the inputs: contiguous, strided, expanded
    grad_layout: str = "contiguous"  # of the incoming gradient: contiguous, strided, expanded
    votes: bool = False  # route_votes instead of dynamic_routing

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_iterations", "leaky", "detach", "eps")}


LEVELS: dict[str, list[Any]] = {
    "sizes": SIZES,
    "share": ["none", "inputs", "outputs", "both"],
    "prior": ["none", "J", "IJ", "BIJ", "B1J", "closed"],
    "bias": ["none", "J", "1"],
    "mask": [False, True],
    "num_iterations": [1, 2, 3, 4, 5],
    "leaky": [False, True],
    "detach": [False, True],
    "eps": [0.0, 1e-2],
    "layout": ["contiguous", "strided", "expanded"],
    "grad_layout": ["contiguous", "strided", "expanded"],
    "votes": [False, True],
}


def pairwise(levels: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Choices of one level for each option in which every pair of levels of any two occurs: the same ones each time."""
    counts = [len(choices) for choices in levels.values()]
    options = range(len(counts))
    left = {(a, x, b, y) for b in options for a in range(b) for x in range(counts[a]) for y in range(counts[b])}
    found = []
    while left:
        a, x, b, y = min(left)
        chosen = {a: x, b: y}
        for option in options:
            if option not in chosen:  # greedily, the level that makes most of the pairs still missing
                gain = [
                    sum(_pair(option, n, *other) in left for other in chosen.items()) for n in range(counts[option])
                ]
                chosen[option] = gain.index(max(gain))
        left -= {_pair(*one, *other) for one in chosen.items() for other in chosen.items() if one[0] != other[0]}
        found.append({name: choices[chosen[n]] for n, (name, choices) in enumerate(levels.items())})
    return found


def pairwise_cases() -> list[Case]:
    """Cases in which every pair of levels of any two options occurs."""
    return [Case(**choice) for choice in pairwise(LEVELS)]


# Input capsules whose routes are all closed, beside options and sizes that take other ways.
CLOSED = [
    Case(prior="closed inputs", **options)
    for options in (
        {},
        {"num_iterations": 1},
        {"leaky": True, "mask": True},
        {"detach": True, "bias": "J"},
        {"sizes": SIZES[1], "mask": True, "grad_layout": "strided"},
        {"sizes": SIZES[1], "share": "inputs", "num_iterations": 2},
        {"sizes": SIZES[1], "share": "both", "bias": "1"},
        {"sizes": SIZES[2]},
        {"sizes": SIZES[4], "votes": True, "layout": "strided"},
        {"votes": True, "num_iterations": 4},
    )
]


def _pair(a: int, x: int, b: int, y: int) -> tuple[int, int, int, int]:
    return (a, x, b, y) if a < b else (b, y, a, x)


def case_id(case: Case) -> str:
    default = Case()
    changed = {name: getattr(case, name) for name in LEVELS if getattr(case, name) != getattr(default, name)}
    return ",".join(f"{name}={value}" for name, value in changed.items()).replace(" ", "") or "default"


# Small calls of all kernels. Native: both tiles of 16 entries and the one of 32, one and several of them, one to four
# batch tiles in a block, poses of several steps, the batch in parts, the loops without branches, those whose matrices
# go through a ring and those with all options, no tiles.
EVERY_KERNEL = {
    "triton": [
        Case(sizes=(18, 5, 3, 4, 6), prior="IJ", bias="J", mask=True),
        Case(sizes=(3, 4, 60, 4, 16), prior="closed inputs"),
        Case(sizes=(5, 6, 4, 20, 8), share="inputs", prior="IJ", mask=True),
        Case(sizes=(5, 6, 4, 20, 8), share="outputs", bias="J", prior="J"),
        Case(sizes=(5, 4, 10, 3, 12), votes=True, detach=True),
    ],
    "native": [
        Case(sizes=(9, 6, 10, 8, 16)),
        Case(sizes=(17, 9, 8, 4, 16), num_iterations=2),
        Case(sizes=(37, 5, 5, 8, 32)),
        Case(sizes=(70, 2, 10, 8, 16), prior="IJ", bias="J"),
        Case(sizes=(90, 13, 10, 8, 16), bias="J"),
        Case(sizes=(130, 3, 8, 8, 16), num_iterations=2),
        Case(sizes=(60, 42, 8, 8, 16), num_iterations=2),
        Case(sizes=(60, 9, 5, 8, 32)),
        Case(sizes=(9, 5, 23, 20, 7), prior="BIJ", mask=True, leaky=True),
        Case(sizes=(3, 7, 20, 8, 16), detach=True),
        Case(sizes=(26, 3, 11, 60, 30), prior="closed"),
        Case(sizes=(4, 3, 3, 70, 9), mask=True, bias="J"),
        Case(sizes=(5, 6, 4, 20, 8), share="inputs", prior="IJ", mask=True),
        Case(sizes=(5, 6, 4, 20, 8), share="both", prior="closed inputs"),
        Case(sizes=(9, 5, 23, 20, 7), prior="closed inputs", mask=True),
        Case(sizes=(5, 6, 4, 20, 40), votes=True, leaky=True),
    ],
}

# Where the Triton kernels go other ways: output capsules in several tiles, poses in several pieces, entries of a vote
# in several warps, each also without matrices and with one for all input capsules.
TILES = [
    Case(sizes=(2, 3, 60, 4, 16), prior="IJ", mask=True),
    Case(sizes=(2, 3, 60, 4, 16), prior="BIJ", leaky=True, num_iterations=2),
    Case(sizes=(2, 3, 50, 4, 16), prior="closed", detach=True),
    Case(sizes=(3, 4, 5, 70, 6), bias="J"),
    Case(sizes=(2, 3, 4, 5, 70)),
    Case(sizes=(2, 3, 110, 5, 30), votes=True, prior="closed inputs"),
    Case(sizes=(2, 3, 4, 5, 70), votes=True, share="outputs", prior="IJ"),
    Case(sizes=(2, 5, 12, 70, 9), share="inputs", prior="BIJ"),
    Case(sizes=(2, 3, 50, 3, 16), share="outputs", prior="BIJ", bias="J"),
]


@dataclass
class Inputs:
    """The tensors of a case (``tensors``: poses or votes, weight, prior, bias), the mask and the incoming gradient."""

    tensors: dict[str, Tensor]
    mask: Tensor | None
    grad: Tensor
    call: Callable[..., Tensor] = field(default=dynamic_routing)


def _layout(tensor: Tensor, layout: str) -> Tensor:
    """The same sizes, otherwise laid out: every other entry of a larger tensor, or expanded over the first axis."""
    if layout == "strided":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "expanded" and tensor.shape[0] > 1:
        return tensor[:1].expand(tensor.shape)
    return tensor.contiguous()


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs, already rounded to ``dtype``, and so large that routing takes a decision."""
    tensors, mask, grad = _deciding_inputs(case, seed)
    rounded = {
        name: _layout(x.to(dtype, copy=True), case.layout if x.dim() > 2 else "contiguous")
        for name, x in tensors.items()
    }
    call = route_votes if case.votes else dynamic_routing
    return Inputs(
        rounded, None if mask is None else mask.clone(), _layout(grad.to(dtype, copy=True), case.grad_layout), call
    )


@functools.cache
def _deciding_inputs(case: Case, seed: int) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
    """Tensors, mask and incoming gradient in float64; made once, and not to be changed.

    With small votes one iteration and three, or full and detached gradients, differ by less than rounding, and a wrong
    kernel passes: the scale is raised until the entropy of the last coupling is below 0.7 log J.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    B, I, J, D_in, D_out = case.sizes
    J_weight = 1 if case.share in ("outputs", "both") else J
    tensors: dict[str, Tensor] = {}
    if case.votes:
        tensors["votes"] = randn(B, I, J_weight, D_out)
    else:
        tensors["poses"] = randn(B, I, D_in)
        tensors["weight"] = randn(1 if case.share in ("inputs", "both") else I, J_weight, D_out, D_in) / D_in**0.5
    priors = {"J": (J,), "IJ": (I, J), "B1J": (B, 1, J), "closed": (I, J)}
    if case.prior != "none":
        tensors["prior"] = randn(*priors.get(case.prior, (B, I, J)))
        if case.prior == "closed" and J > 1:
            tensors["prior"][:, 0] = -math.inf
        if case.prior == "closed inputs":
            tensors["prior"][:, ::3] = -math.inf
    if case.bias != "none":
        tensors["bias"] = randn(J if case.bias == "J" else 1, D_out)
    mask = torch.rand(B, I, generator=generator) < 0.7 if case.mask else None
    outputs = max(J_weight, J if case.prior != "none" else 1, J if case.bias == "J" else 1)
    grad = randn(B, outputs, D_out)

    tensors = {name: _layout(x, case.layout if x.dim() > 2 else "contiguous") for name, x in tensors.items()}
    first = "votes" if case.votes else "poses"
    # One output capsule, or nothing to tell them apart, leaves nothing to decide; nor does one iteration without prior.
    alike = J_weight == 1 and case.prior == "none" and case.bias != "J"
    scaled = [first] * (case.num_iterations > 1) + ["prior"] * ("prior" in tensors)
    while scaled and outputs > 1 and not alike and last_entropy(case, tensors, mask) >= 0.7 * math.log(outputs):
        for name in scaled:
            # In place, as the layout must stay; an expanded tensor has one row to scale.
            rows = tensors[name][:1] if tensors[name].stride(0) == 0 else tensors[name]
            rows *= 1.25
    return tensors, mask, grad


def last_entropy(case: Case, tensors: dict[str, Tensor], mask: Tensor | None) -> float:
    """The mean entropy over the samples' input capsules (those that vote) of the last coupling, by the oracle."""
    arrays = {name: x.numpy() for name, x in tensors.items()}
    _, c = oracle(**arrays, mask=None if mask is None else mask.numpy(), **case.options)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(c > 0, c * np.log(c), 0).sum(-1)
    votes = c.sum(-1) > 0
    deciding = entropy[votes if mask is None else votes & mask.numpy()]
    return float(deciding.mean()) if deciding.size else 0.0


def oracle(
    *,
    poses: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    votes: np.ndarray | None = None,
    prior: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    num_iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    eps: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Sabour's procedure 1 in numpy, written from the paper: output and last coupling."""
    if votes is None:
        assert poses is not None
        assert weight is not None
        weight = np.broadcast_to(weight, (poses.shape[1], *weight.shape[1:]))
        votes = np.einsum("bik,ijdk->bijd", poses, weight)
    if mask is not None:
        votes = np.where(mask[:, :, None, None], votes, 0.0)
    B, I, J, D_out = votes.shape
    J = max(J, *(x.shape[axis] for x, axis in ((prior, -1), (bias, 0)) if x is not None), 1)
    votes = np.broadcast_to(votes, (B, I, J, D_out))
    logits = np.zeros((B, I, J)) if prior is None else np.zeros((B, I, J)) + prior
    if mask is not None:
        logits[~mask] = 0.0
    for t in range(num_iterations):
        shares = np.exp(logits)
        total = shares.sum(-1, keepdims=True) + (1.0 if leaky else 0.0)
        coupling = shares / np.where(total > 0, total, 1.0)
        s = np.einsum("bij,bijd->bjd", coupling, votes)
        if bias is not None:
            s = s + bias
        n = np.sqrt((s**2).sum(-1, keepdims=True))
        root = np.sqrt(n**2 + eps)
        out = n**2 / (1 + n**2) * s / np.where(root > 0, root, 1.0)
        if t < num_iterations - 1:
            logits = logits + np.einsum("bijd,bjd->bij", votes, out)
    return out, coupling


def run(op: Callable[..., Tensor], case: Case, inputs: Inputs, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The output and the gradients of all inputs; a gradient that is None counts as 0."""
    names = list(inputs.tensors)
    leaves = [inputs.tensors[name].detach().to(device=device, dtype=dtype).requires_grad_() for name in names]
    # The op sees a non-leaf of the wanted layout, as in a network.
    views = [_layout_like(leaf, inputs.tensors[name]) for leaf, name in zip(leaves, names, strict=True)]
    mask = None if inputs.mask is None else inputs.mask.to(device)
    out = op(**dict(zip(names, views, strict=True)), mask=mask, **case.options)
    grad = inputs.grad.to(device=device, dtype=dtype)
    # Of the views, not of the leaves: the sum over an expanded axis is autograd's, in the half type if need be.
    grads = torch.autograd.grad(out, views, grad, allow_unused=True)
    result = {"output": out.detach()}
    for name, view, gradient in zip(names, views, grads, strict=True):
        result[name] = torch.zeros_like(view) if gradient is None else gradient
    return result


def _layout_like(leaf: Tensor, like: Tensor) -> Tensor:
    if like.dim() > 1 and like.stride(0) == 0 and like.shape[0] > 1:
        return leaf[:1].expand(leaf.shape)
    if like.stride(-1) == 2:
        return torch.stack([leaf, torch.full_like(leaf, math.nan)], -1)[..., 0]
    return leaf


def reference_op(**arguments: Any) -> Tensor:
    """The reference through the same checks, mask and casts as every backend."""
    call = route_votes if "votes" in arguments else dynamic_routing
    return call(**arguments, backend="reference")


def size_of(name: str, exact: dict[str, Tensor]) -> float:
    """What an error is relative to: the norm. A gradient may be 0 because its terms cancel (of a softmax with one open
    route, say), and their roundings are left: then it is the largest norm, as the terms are not larger than others."""
    size = exact[name].norm().item()
    return size if size > 0 or name == "output" else max(value.norm().item() for value in exact.values())


def error_of(name: str, result: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The relative error of one of the results of :func:`run`."""
    size, difference = size_of(name, exact), (result[name].cpu().double() - exact[name]).norm().item()
    return difference / size if size > 0 else 0.0 if difference == 0 else math.inf


@functools.cache
def exact_results(case: Case, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """What :func:`run` gives in float64 on the inputs in ``dtype``; computed once, and not to be changed."""
    return run(reference_op, case, make_inputs(case, dtype, seed), torch.float64, "cpu")


@functools.cache
def errors_of_reference(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, float]:
    """How far plain PyTorch in ``dtype`` is from float64: the largest of three draws of the inputs, as the error of a
    tensor with few entries may be small by luck. For float64 itself, where nothing more exact is at hand, it is
    float32's error times the ratio of the two roundings."""
    if dtype == torch.float64:
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return {name: scale * error for name, error in errors_of_reference(case, torch.float32, device, seed).items()}
    errors: dict[str, float] = {}
    for draw in range(seed, seed + 3):
        exact = exact_results(case, dtype, draw)
        result = run(reference_op, case, make_inputs(case, dtype, draw), dtype, device)
        for name in exact:
            errors[name] = max(errors.get(name, 0.0), error_of(name, result, exact))
    return errors


def check(op: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
    """Assert that ``op`` is as exact as the dtype allows: output and every gradient against float64."""
    inputs = make_inputs(case, dtype, seed)
    exact, result = exact_results(case, dtype, seed), run(op, case, inputs, dtype, device)
    reference_error = errors_of_reference(case, dtype, device, seed)
    for name, value in exact.items():
        gradient = name != "output"
        assert result[name].dtype == dtype, f"{name} has dtype {result[name].dtype}"
        assert result[name].shape == value.shape, f"{name} has shape {tuple(result[name].shape)}"
        # Below its smallest normal number a type rounds by half a subnormal step, however exact the computation was.
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
        size = size_of(name, exact)
        underflow = step * value.numel() ** 0.5 / size if size > 0 else 0.0
        roundings = compute_dtype(dtype) if value.norm() == 0 else dtype  # nothing is rounded once but what is left
        budget = error_budget(roundings, reference_error[name], gradient) + underflow
        error = error_of(name, result, exact)
        assert error <= budget, f"{name}: relative error {error:.2e}, allowed {budget:.2e}"
        largest = (value.abs().max().item() if value.numel() else 0.0) or size
        worst = (result[name].cpu().double() - value).abs().max().item() if value.numel() else 0.0
        assert worst <= 8 * budget * largest, f"{name}: an entry is off by {worst:.2e}, largest is {largest:.2e}"


def backend_op(backend: str) -> Callable[..., Tensor]:
    """The public functions with a backend chosen, as an op for ``check``."""

    def op(**arguments: Any) -> Tensor:
        call = route_votes if "votes" in arguments else dynamic_routing
        return call(**arguments, backend=backend)

    return op


def require(implementation: tuple[str, str], dtype: torch.dtype) -> None:
    """Skip where the implementation has no such dtype."""
    if implementation[0] == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    if implementation == ("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates where it stores bfloat16")


# What the native CPU kernels put into the lanes, or do without; few samples of many inputs are long to interpret.
REGIMES = ["samples", "shared"] if INTERPRET else ["samples", "capsules", "shared"]


def small_inputs(
    device: str = "cpu", dtype: torch.dtype = torch.float64, grad: bool = True, regime: str = "samples"
) -> dict[str, Tensor]:
    """poses, weight, prior and bias of B=3, I=5, J=4, D_in=3, D_out=2; few samples of many input capsules, B=2, I=69,
    for the regime "capsules", one matrix for all input capsules for "shared"."""
    B, I = (2, 69) if regime == "capsules" else (3, 5)
    matrices = 1 if regime == "shared" else I
    shapes = {"poses": (B, I, 3), "weight": (matrices, 4, 2, 3), "prior": (B, I, 4), "bias": (4, 2)}
    return {n: (2 * torch.randn(s, dtype=dtype)).to(device).requires_grad_(grad) for n, s in shapes.items()}
