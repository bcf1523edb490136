"""A benchmark of one routing layer beside routing in plain PyTorch; what computes wrong numbers is not timed.

The alternatives are three forms of routing in plain PyTorch: votes by broadcasting, as most tutorials write it, votes
by einsum, and no votes at all. Each runs eager and compiled; einsum also in chunks of the batch, whose votes stay in
the cache.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcaps._deprecated import FormerTuple, once_positional
from fastcaps.exactness import relative_error
from fastcaps.functional import squash
from fastcaps.measure import reset_peak
from fastcaps.routing import dynamic_routing
from fastcaps.routing.dynamic.reference import iterations, last_output

CHUNK = 8  # samples
TOLERANCE = 1e-4  # relative, float32 against float64: a contestant with a larger error is not timed
SHORT = 5.0  # milliseconds that one measurement lasts at least
HALF = "fastcaps, bfloat16"
HALF_TOLERANCE = 2e-2  # against float64 on inputs that were not rounded

Step = Callable[..., Tensor]


class Sizes(NamedTuple):
    """The sizes of one routing layer: samples, input and output capsules, and their pose sizes."""

    B: int
    I: int
    J: int
    D_in: int
    D_out: int


@dataclasses.dataclass(frozen=True)
class Timing(FormerTuple):
    """The times and the errors of one contestant.

    Attributes:
        name: the contestant.
        forward: milliseconds of each round, without gradient; None: not timed.
        training: milliseconds of each round, forward and backward; None: not timed.
        error: relative L2 error of the output against float64.
        gradient_error: the larger one of poses' and weight's gradients.
        peak: largest memory beyond inputs in one training step, in bytes (CUDA only, else None).
        refused: why it is not timed, or None.
    """

    name: str
    forward: list[float] | None
    training: list[float] | None
    error: float
    gradient_error: float
    peak: int | None
    refused: str | None


def _first_logits(u: Tensor, prior: Tensor | None) -> Tensor:
    """``[B, I, J]`` for votes ``[B, I, J, D_out]``."""
    zeros = torch.zeros(u.shape[:3], dtype=u.dtype, device=u.device)
    return zeros if prior is None else zeros + prior.to(u.dtype)


def einsum_routing(poses: Tensor, weight: Tensor, num_iterations: int, prior: Tensor | None = None) -> Tensor:
    """Routing in einsums, with the votes in memory: poses ``[B, I, D_in]`` to ``[B, J, D_out]``."""
    equation = "jdk,bik->bijd" if weight.shape[0] == 1 else "ijdk,bik->bijd"
    u = torch.einsum(equation, weight[0] if weight.shape[0] == 1 else weight, poses)
    return last_output(iterations(u, _first_logits(u, prior), None, num_iterations))


def broadcast_routing(poses: Tensor, weight: Tensor, num_iterations: int, prior: Tensor | None = None) -> Tensor:
    """Routing as most tutorials write it: a broadcast matrix product, then products and sums of whole tensors."""

    def weighted_sum(c: Tensor, u: Tensor) -> Tensor:
        return (c[..., None] * u).sum(1)

    def agreement(u: Tensor, v: Tensor) -> Tensor:
        return (u * v[:, None]).sum(-1)

    u = (weight[None] @ poses[:, :, None, :, None])[..., 0]
    logits = _first_logits(u, prior)
    return last_output(iterations(u, logits, None, num_iterations, weighted_sum=weighted_sum, agreement=agreement))


def absorbed_routing(poses: Tensor, weight: Tensor, num_iterations: int, prior: Tensor | None = None) -> Tensor:
    """Routing without votes, as ``<W x, V> = <x, W^T V>`` and ``sum c W x = W sum c x``: pays where W is shared."""
    shared = weight.shape[0] == 1
    W, w = (weight[0], "jdk") if shared else (weight, "ijdk")
    logits = poses.new_zeros(*poses.shape[:2], weight.shape[1])
    if prior is not None:
        logits = logits + prior.to(poses.dtype)
    V: Tensor | float = 0.0
    first = logits
    for t in range(num_iterations):
        c = logits.softmax(-1)
        if shared:
            s = torch.einsum("jdk,bjk->bjd", W, torch.einsum("bij,bik->bjk", c, poses))
        else:
            s = torch.einsum("ijdk,bijk->bjd", W, c[..., None] * poses[:, :, None])
        v = squash(s)
        if t < num_iterations - 1:
            V = V + v
            y = torch.einsum(f"{w},bjd->b{'' if shared else 'i'}jk", W, V)
            logits = first + torch.einsum("bik,bjk->bij" if shared else "bik,bijk->bij", poses, y)
    return v


FORMS: dict[str, Callable[..., Tensor]] = {
    "broadcast": broadcast_routing,
    "einsum": einsum_routing,
    "absorbed": absorbed_routing,
}


def contestants(
    num_iterations: int,
    backend: str | None = None,
    *,
    forms: Sequence[str] = ("einsum",),
    chunk: int = CHUNK,
    prior: Tensor | None = None,
    mask: Tensor | None = None,
) -> dict[str, Step]:
    """The op and its alternatives: functions that take poses, weight and the output's gradient or None, and return the
    output after adding to the inputs' ``grad`` where a gradient is given.

    Args:
        num_iterations: T.
        backend: of fastcaps; None: its default.
        forms: which of :data:`FORMS` compete.
        chunk: samples in a chunk of the chunked form (of einsum only).
        prior: ``[I, J]``, learned where it requires a gradient, or None.
        mask: ``[B, I]`` bool, or None.
    """

    def whole(routing: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Step:
        def step(poses: Tensor, weight: Tensor, grad: Tensor | None, start: int = 0) -> Tensor:
            out = routing(poses, weight, None if mask is None else mask[start : start + len(poses)])
            if grad is not None:
                out.backward(grad)
            return out.detach()

        return step

    def chunked(routing: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Step:
        step = whole(routing)

        def steps(poses: Tensor, weight: Tensor, grad: Tensor | None) -> Tensor:
            starts = range(0, len(poses), chunk)
            grads = [None] * len(starts) if grad is None else grad.split(chunk)
            into = None if grad is None else torch.empty_like(poses)
            outs = []
            for x, g, start in zip(poses.detach().split(chunk), grads, starts, strict=True):
                # A leaf of its own: the gradient of a slice would be as large as all poses.
                outs.append(step(x.requires_grad_(g is not None), weight, g, start))
                if into is not None:
                    into[start : start + chunk] = x.grad
            poses.grad = into
            return torch.cat(outs)

        return steps

    def plain(form: str) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        def routing(poses: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
            if mask is not None:
                poses = poses.masked_fill(~mask[..., None], 0)
            return FORMS[form](poses, weight, num_iterations, prior)

        return routing

    def ours(poses: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        p = None if prior is None else prior.to(poses.dtype)
        return dynamic_routing(poses, weight, num_iterations=num_iterations, prior=p, mask=mask, backend=backend)

    steps: dict[str, Step] = {}
    for form in forms:
        compiled = torch.compile(plain(form), dynamic=False, fullgraph=True)
        steps[form] = whole(plain(form))
        if form == "einsum":
            steps[f"{form}, chunks of {chunk}"] = chunked(plain(form))
        steps[f"{form}, compiled"] = whole(compiled)
        if form == "einsum":
            steps[f"{form}, compiled, chunks of {chunk}"] = chunked(compiled)
    return {**steps, "fastcaps": whole(ours)}


# Past the limit a frame runs eager without a word.
@once_positional(("B", "I", "J", "D_in", "D_out"))
@torch._dynamo.config.patch(recompile_limit=64)
def compare(
    *,
    B: int,
    I: int,
    J: int,
    D_in: int,
    D_out: int,
    num_iterations: int = 3,
    device: str = "cpu",
    rounds: int = 7,
    names: list[str] | None = None,
    backend: str | None = None,
    forms: Sequence[str] = ("einsum",),
    chunk: int = CHUNK,
    shared: bool = False,
    prior: bool = False,
    mask: bool = False,
    half: bool = False,
) -> list[Timing]:
    """Time the contestants round by round, so that a slow minute of a shared machine hits all alike.

    Args:
        B: samples.
        I: input capsules.
        J: output capsules.
        D_in: pose size of the input capsules.
        D_out: pose size of the output capsules.
        num_iterations: T.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: rounds of one forward and one training step for each contestant; the poses change between rounds.
        names: the contestants wanted; None: all.
        backend: of fastcaps; None: its default.
        forms: the plain-PyTorch forms that compete, of :data:`FORMS`.
        chunk: samples in a chunk of the chunked form.
        shared: one matrix for all input capsules.
        prior: with initial logits ``[I, J]`` that are learned.
        mask: with a mask that leaves out a third of the input capsules.
        half: also fastcaps on bfloat16 inputs, as ``"fastcaps, bfloat16"``.

    Returns:
        One :class:`Timing` per contestant, float32 but for the last.

    Example:
        >>> timings = compare(B=2, I=6, J=3, D_in=4, D_out=8, rounds=1, names=["einsum", "fastcaps"])
        >>> [timing.name for timing in timings]
        ['einsum', 'fastcaps']
    """
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(B, I, D_in, generator=generator).to(device) / D_in**0.5 for _ in range(4)]
    weight = (torch.randn(1 if shared else I, J, D_out, D_in, generator=generator) / 2).to(device)
    grad = torch.randn(B, J, D_out, generator=generator).to(device)
    logits = torch.randn(I, J, generator=generator).to(device).requires_grad_() if prior else None
    voting = (torch.rand(B, I, generator=generator) > 1 / 3).to(device) if mask else None
    extras: dict[str, Any] = {"prior": logits, "mask": voting}
    steps = contestants(num_iterations, backend, forms=forms, chunk=chunk, **extras)
    if half:
        steps[HALF] = steps["fastcaps"]
    steps = {n: s for n, s in steps.items() if names is None or n in names}

    few = min(B, 16)  # samples are independent, so a few of them tell whether a contestant is right
    einsum = contestants(num_iterations, **extras)["einsum"]
    exact = _gradients(einsum, batches[0][:few], weight, grad[:few], torch.float64)
    timings = {name: _admit(name, step, batches[0], weight, grad, exact) for name, step in steps.items()}
    _take_turns(steps, timings, batches, weight, grad, rounds)
    return list(timings.values())


def _dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if name == HALF else torch.float32


def _admit(name: str, step: Step, poses: Tensor, weight: Tensor, grad: Tensor, exact: list[Tensor]) -> Timing:
    """A contestant's errors against ``exact``, of the first samples; with room for its times where they are small."""
    few = len(exact[0])
    grad = torch.cat([grad[:few], torch.zeros_like(grad[few:])])
    try:
        result = _gradients(step, poses, weight, grad, _dtype(name))
    except Exception as error:  # torch.compile without a C++ compiler, votes that do not fit: the others still run
        return Timing(name, None, None, math.inf, math.inf, None, f"{type(error).__name__}: {error}"[:200])
    errors = [relative_error(r[: len(e)], e) for r, e in zip(result, exact, strict=True)]
    allowed = HALF_TOLERANCE if name == HALF else TOLERANCE
    wrong = [e for e in errors if not e <= allowed]  # NaN is wrong too
    if wrong:
        return Timing(name, None, None, errors[0], max(errors[1:]), None, f"its error is {wrong[0]:.1e}")
    return Timing(name, [], [], errors[0], max(errors[1:]), None, None)


def _take_turns(
    steps: dict[str, Step], timings: dict[str, Timing], batches: list[Tensor], weight: Tensor, grad: Tensor, rounds: int
) -> None:
    """Time the admitted contestants round by round, and write into ``timings``."""
    device = weight.device.type
    repeats = dict.fromkeys(steps, (1, 1))
    for n in range(rounds + 2):  # the first round only warms up, the second finds out how long a call takes
        for name, step in steps.items():
            timing = timings[name]
            if timing.forward is None or timing.training is None:
                continue
            dtype = _dtype(name)
            poses = [batches[(n + m) % len(batches)].to(dtype, copy=True) for m in range(min(4, max(repeats[name])))]
            leaf, incoming = weight.to(dtype, copy=True), grad.to(dtype)
            with torch.no_grad():
                forward = _milliseconds(step, poses, leaf, None, repeats[name][0])
            for x in (leaf, *poses):
                x.requires_grad_()
            before = reset_peak(device)
            training = _milliseconds(step, poses, leaf, incoming, repeats[name][1])
            if device == "cuda":
                timings[name] = dataclasses.replace(timing, peak=torch.cuda.max_memory_allocated() - before)
            if n == 1:  # short calls are repeated: each alone would mostly wait for what the others left in the caches
                repeats[name] = max(1, int(SHORT / forward)), max(1, int(SHORT / training))
            if n > 1:
                timing.forward.append(forward)
                timing.training.append(training)


def _gradients(
    step: Step, poses: Tensor, weight: Tensor, grad: Tensor, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    x, w = (t.to(dtype, copy=True).requires_grad_() for t in (poses, weight))
    out = step(x, w, grad.to(dtype))
    assert x.grad is not None
    assert w.grad is not None
    return [out, x.grad, w.grad]


def _milliseconds(step: Step, poses: list[Tensor], weight: Tensor, grad: Tensor | None, repeats: int) -> float:
    """The mean time of ``repeats`` calls, on poses that change from call to call."""
    if weight.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for n in range(repeats):
        x = poses[n % len(poses)]
        x.grad = weight.grad = None
        step(x, weight, grad)
    if weight.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats


def median_and_p20(times: list[float]) -> tuple[float, float]:
    """The median and the 20th percentile: the second is what a shared machine does in its quiet moments."""
    return statistics.median(times), sorted(times)[len(times) // 5]
