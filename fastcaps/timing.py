"""Timing one routing layer beside the best that plain PyTorch can do, correctness first.

The alternatives are the einsum form of routing, which is the fastest of the published plain-PyTorch forms, run eager,
in chunks of the batch (its votes then stay in the cache), compiled, and both.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastcaps.functional import squash
from fastcaps.ready import relative_error
from fastcaps.routing import dynamic_routing

CHUNK = 8  # samples
TOLERANCE = 1e-4  # relative, float32 against float64: who is further off is not timed

Step = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Timing(NamedTuple):
    """One contestant: times in milliseconds (None: not timed), the error that it was admitted with.

    Attributes:
        name: who.
        forward: the times of the rounds, without gradient.
        training: the times of the rounds, forward and backward.
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


def einsum_routing(poses: Tensor, weight: Tensor, num_iterations: int) -> Tensor:
    """Routing in einsums, with the votes in memory: poses ``[B, I, D_in]`` to ``[B, J, D_out]``."""
    u = torch.einsum("ijdk,bik->bijd", weight, poses)
    logits = torch.zeros(u.shape[:3], dtype=u.dtype, device=u.device)
    for t in range(num_iterations):
        v = squash(torch.einsum("bij,bijd->bjd", logits.softmax(-1), u))
        if t < num_iterations - 1:
            logits = logits + torch.einsum("bijd,bjd->bij", u, v)
    return v


def contestants(num_iterations: int, backend: str | None = None) -> dict[str, Step]:
    """The op and its alternatives: functions that take poses, weight and the output's gradient or None, and return the
    output after adding to the inputs' ``grad`` where a gradient is given."""

    def whole(routing: Callable[[Tensor, Tensor], Tensor]) -> Step:
        def step(poses: Tensor, weight: Tensor, grad: Tensor | None) -> Tensor:
            out = routing(poses, weight)
            if grad is not None:
                out.backward(grad)
            return out.detach()

        return step

    def chunked(routing: Callable[[Tensor, Tensor], Tensor]) -> Step:
        step = whole(routing)

        def steps(poses: Tensor, weight: Tensor, grad: Tensor | None) -> Tensor:
            grads = [None] * len(poses) if grad is None else grad.split(CHUNK)
            return torch.cat([step(x, weight, g) for x, g in zip(poses.split(CHUNK), grads, strict=False)])

        return steps

    def einsum(poses: Tensor, weight: Tensor) -> Tensor:
        return einsum_routing(poses, weight, num_iterations)

    compiled = torch.compile(einsum, dynamic=False)
    return {
        "einsum": whole(einsum),
        f"einsum, chunks of {CHUNK}": chunked(einsum),
        "compiled": whole(compiled),
        f"compiled, chunks of {CHUNK}": chunked(compiled),
        "fastcaps": whole(lambda x, w: dynamic_routing(x, w, num_iterations=num_iterations, backend=backend)),
    }


def compare(
    sizes: tuple[int, int, int, int, int],
    *,
    num_iterations: int = 3,
    device: str = "cpu",
    rounds: int = 7,
    names: list[str] | None = None,
    backend: str | None = None,
) -> list[Timing]:
    """Time the contestants round by round, so that a slow minute of a shared machine hits all alike.

    Args:
        sizes: ``(B, I, J, D_in, D_out)``.
        num_iterations: T.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: rounds of one forward and one training step for each contestant; the poses change between rounds.
        names: the contestants wanted; None: all.
        backend: of fastcaps; None: its default.

    Returns:
        One :class:`Timing` per contestant, float32.

    Example:
        >>> [timing.name for timing in compare((2, 6, 3, 4, 8), rounds=1, names=["einsum", "fastcaps"])]
        ['einsum', 'fastcaps']
    """
    B, I, J, D_in, D_out = sizes
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(B, I, D_in, generator=generator).to(device) / D_in**0.5 for _ in range(4)]
    weight = (torch.randn(I, J, D_out, D_in, generator=generator) / 2).to(device)
    grad = torch.randn(B, J, D_out, generator=generator).to(device)
    steps = {n: s for n, s in contestants(num_iterations, backend).items() if names is None or n in names}

    few = min(B, 16)  # samples are independent, so a few of them tell whether a contestant is right
    exact = _gradients(contestants(num_iterations)["einsum"], batches[0][:few], weight, grad[:few], torch.float64)
    timings = {}
    for name, step in steps.items():
        try:
            result = _gradients(step, batches[0], weight, torch.cat([grad[:few], torch.zeros_like(grad[few:])]))
        except Exception as error:  # torch.compile without a C++ compiler, votes that do not fit: the others still run
            timings[name] = Timing(name, None, None, math.inf, math.inf, None, f"{type(error).__name__}: {error}"[:200])
            continue
        errors = [relative_error(r[: len(e)], e) for r, e in zip(result, exact, strict=True)]
        worst = max(errors)
        refused = None if worst <= TOLERANCE else f"its error is {worst:.1e}"
        times: list[list[float] | None] = [None, None] if refused else [[], []]
        timings[name] = Timing(name, times[0], times[1], errors[0], max(errors[1:]), None, refused)
    for n in range(rounds + 1):  # the first round only warms up
        for name, step in steps.items():
            if timings[name].forward is None:
                continue
            poses = batches[n % len(batches)].clone()
            with torch.no_grad():
                forward = _milliseconds(step, poses, weight, None)
            leaf = weight.clone().requires_grad_()
            poses.requires_grad_()
            before = _reset_peak(device)
            training = _milliseconds(step, poses, leaf, grad)
            if device == "cuda":
                timings[name] = timings[name]._replace(peak=torch.cuda.max_memory_allocated() - before)
            if n:
                timings[name].forward.append(forward)  # type: ignore[union-attr]
                timings[name].training.append(training)  # type: ignore[union-attr]
    return list(timings.values())


def saved_bytes(routing: Callable[[Tensor, Tensor], Tensor], poses: Tensor, weight: Tensor) -> int:
    """What autograd keeps between the forward and the backward of ``routing``, beside poses and weight, in bytes.

    Args:
        routing: from poses and weight to output poses, once through.
        poses: ``[B, I, D_in]``, requiring a gradient.
        weight: ``[I, J, D_out, D_in]``, requiring a gradient.
    """
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = routing(poses, weight)
    for x in (poses, weight):
        storages.pop(x.untyped_storage().data_ptr(), None)
    del out  # until here, so that no address was used twice
    return sum(storages.values())


def _reset_peak(device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _gradients(
    step: Step, poses: Tensor, weight: Tensor, grad: Tensor, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    x, w = (t.to(dtype, copy=True).requires_grad_() for t in (poses, weight))
    out = step(x, w, grad.to(dtype))
    assert x.grad is not None
    assert w.grad is not None
    return [out, x.grad, w.grad]


def _milliseconds(step: Step, poses: Tensor, weight: Tensor, grad: Tensor | None) -> float:
    if poses.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(poses, weight, grad)
    if poses.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def median_and_p20(times: list[float]) -> tuple[float, float]:
    """The median and the 20th percentile: the second is what a shared machine does in its quiet moments."""
    return statistics.median(times), sorted(times)[len(times) // 5]
