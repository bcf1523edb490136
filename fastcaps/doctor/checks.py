"""The checks of a whole model: NaN, zero capsules, and whether it trains."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.modules import floating_tensors, full_copy, map_floating
from fastcaps.doctor.axes import ClassCapsules
from fastcaps.doctor.finding import (
    FINE,
    FINITE,
    INITIALISATION,
    SUSPICIOUS,
    UNKNOWN,
    WRONG,
    ZERO_CAPSULES,
    Finding,
)
from fastcaps.doctor.independence import first_line
from fastcaps.doctor.trials import scaled_copy
from fastcaps.doctor.watch import Call, Run, is_inside, is_torch
from fastcaps.losses import margin_loss

SATURATED, SILENT = 0.98, 0.02  # lengths of all output capsules
STEPS, TRAINS = 40, 0.02  # Adam steps of the training probe, and by what share they must lower the loss


def finite(output: Any) -> Finding:
    """Is there a NaN or an infinity in what the model returns?"""
    shares = [t.isfinite().double().mean().item() for t in floating_tensors(output) if t.numel()]
    if not shares:
        return Finding(FINITE, "", UNKNOWN, "the model returns no floating-point tensor")
    if min(shares) == 1:
        return Finding(FINITE, "", FINE, "no entry is NaN or infinite on this sample")
    text = f"{100 * (1 - min(shares)):.3g} % of an output's entries are NaN or infinite on this sample"
    return Finding(
        FINITE, "", WRONG, text, "look for it in the sample and in the parameters, then at the zero capsules"
    )


def zero_capsules(calls: list[Call]) -> Iterator[Finding]:
    """Zero inputs and zero parameters: the innermost modules that give NaN, forward or backward."""
    bad: dict[str, str] = {}
    tried = set()
    for call in sorted(calls, key=lambda call: -call.path.count(".") - bool(call.path)):
        if is_torch(call.module) or call.module in tried or any(is_inside(path, call.path) for path in bad):
            continue
        tried.add(call.module)
        mistake = _mistake_at_zero(call)
        if mistake is not None:
            bad[call.path] = mistake
    for path, text in bad.items():
        yield Finding(
            ZERO_CAPSULES, path, WRONG, f"with zero inputs and parameters {text}",
            "compute squash as s * n / (1 + n^2), and n without the infinite slope of sqrt at 0 (fastcaps.squash does)",
        )  # fmt: skip
    if not bad:
        yield Finding(ZERO_CAPSULES, "", FINE, "with zero inputs and parameters all outputs and gradients are finite")


def _mistake_at_zero(call: Call) -> str | None:
    """Where a module gives NaN for zero inputs and parameters, in words; None where it does not."""
    module = scaled_copy(call.module, 0.0)
    arguments = map_floating(lambda t: torch.zeros_like(t).requires_grad_(), (call.args, call.kwargs))
    args, kwargs = arguments
    try:
        y = [t for t in floating_tensors(module(*args, **kwargs)) if t.requires_grad]
        if not all(t.isfinite().all() for t in y):
            return "the output is NaN"
        leaves = [*floating_tensors(arguments), *module.parameters()]
        grads = torch.autograd.grad([t.sum() for t in y], leaves, allow_unused=True) if y else ()
    except Exception:  # a module that cannot run on zeros alone tells nothing
        return None
    finite = all(g.isfinite().all() for g in grads if g is not None)
    return None if finite else "the output is finite, the gradient is NaN"


def _train(model: nn.Module, run: Run, classes: ClassCapsules, labels: Tensor) -> list[float]:
    """The margin loss before each step of Adam, and after the last."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(STEPS + 1):
        lengths = classes.lengths(model(*run.args, **run.kwargs))
        if not lengths.requires_grad:
            raise ValueError("in training its output carries no gradient")
        loss = margin_loss(lengths, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def initialisation(run: Run, classes: ClassCapsules | None) -> Finding:
    """Are all output capsules saturated or silent, and does a short training on the sample lower the margin loss?"""
    if classes is None:
        return Finding(INITIALISATION, "", UNKNOWN, "no output was found that holds class capsules or their lengths")
    lengths = classes.lengths(run.output).detach()
    if not lengths.isfinite().all():
        return Finding(INITIALISATION, "", UNKNOWN, "the model's output is not finite")
    if not any(p.requires_grad for p in run.model.parameters()):
        return Finding(INITIALISATION, "", UNKNOWN, "no parameter requires a gradient")
    labels = torch.arange(run.B, device=lengths.device) % lengths.shape[1]
    try:
        losses = _train(full_copy(run.model).train(), run, classes, labels)
    except Exception as error:  # in training it may want labels, or keep a graph from step to step
        return Finding(INITIALISATION, "", UNKNOWN, f"it does not train on the sample alone: {first_line(error)}")
    text = (
        f"lengths {lengths.min():.2g} to {lengths.max():.2g}, mean {lengths.mean():.2g}; {STEPS} steps of Adam on the "
        f"sample take the margin loss from {losses[0]:.3g} to {losses[-1]:.3g}"
    )
    if lengths.max() < SILENT:
        fix = "learn a bias [J, D_out] of norm 1/3: alone it gives each capsule length 0.1, however many there are"
    else:
        fix = "initialise the matrices with a deviation of sqrt(J / (I D_out)) at most, and check the squash"
    if not losses[-1] <= (1 - TRAINS) * losses[0]:
        return Finding(INITIALISATION, "", WRONG, text, fix)
    if lengths.min() > SATURATED:
        return Finding(INITIALISATION, "", SUSPICIOUS, f"all output capsules are saturated: {text}", fix)
    return Finding(INITIALISATION, "", FINE, text)
