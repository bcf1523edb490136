"""The checks of what a sample's output must not depend on: the calls before, and the other samples."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.contents import held
from fastcaps.convert.modules import floating_tensors, full_copy, map_floating
from fastcaps.doctor.axes import Routing
from fastcaps.doctor.finding import BATCH_MATES, FINE, KEPT_STATE, UNKNOWN, WRONG, Finding
from fastcaps.doctor.trials import scaled_copy
from fastcaps.doctor.watch import Call, Run, Softmax, batch_axis, is_inside, is_torch

CHANGES = 1e-4  # relative: what rounding cannot explain in float32
DRAWN = "equal calls of equal copies differ: it draws random numbers from a generator that cannot be seeded here"
ENLARGED = (10.0, 100.0, 1000.0)  # factors of the weights: with small ones the logits hardly matter


@torch.no_grad()
def kept_state(run: Run) -> Finding:
    """Do two equal calls, one after the other, give equal outputs?"""
    model = full_copy(run.model)
    before = _run(model, run.args, run.kwargs)
    was = _contents(model)
    after = _run(model, run.args, run.kwargs)
    pairs = list(zip(floating_tensors(before.output), floating_tensors(after.output), strict=False))
    if not all(t.isfinite().all() for pair in pairs for t in pair):
        return Finding(KEPT_STATE, "", UNKNOWN, "the model's output is not finite")
    change = max((_relative(a, b) for a, b in pairs if a.shape == b.shape), default=0.0)
    if change <= CHANGES:
        return Finding(KEPT_STATE, "", FINE, f"of two equal calls the second differs by {change:.0e}")
    if _varies(run.model, run.args, run.kwargs):
        return Finding(KEPT_STATE, "", UNKNOWN, DRAWN)
    names = [name for name, value in _contents(model).items() if not _equal(value, was.get(name))]
    text = f"of two equal calls the second differs by {100 * change:.2g} %"
    return Finding(
        KEPT_STATE, "", WRONG, text + (f"; in between {', '.join(names[:3])} changed" if names else ""),
        "make the routing logits anew in every call, as a local variable of forward",
    )  # fmt: skip


def _run(model: nn.Module, args: Any, kwargs: Any) -> Run:
    """A run of the model itself, with arguments that it may change."""
    return Run.of(model, *map_floating(lambda t: t.detach().clone(), (args, kwargs)))


def _varies(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether two equal calls of equal copies differ: by random numbers of a generator that cannot be seeded here."""
    one, other = (floating_tensors(_run(full_copy(model), args, kwargs).output) for _ in range(2))
    return any(a.shape != b.shape or _relative(a, b) > CHANGES for a, b in zip(one, other, strict=False))


def _contents(model: nn.Module) -> dict[str, Any]:
    """Everything that a model holds, tensors as they are now."""
    values = {**held(model), **dict(model.named_parameters())}
    return {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in values.items()}


def _equal(a: Any, b: Any) -> bool:
    """Whether two things that a model holds are equal; other objects than tensors and numbers are not compared."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return a == b if isinstance(a, (bool, int, float, str)) else type(a) is type(b)


def batch_mates(run: Run, routings: list[Routing]) -> Iterator[Finding]:
    """Does the first sample's output change when all others become another one, and is a softmax over the batch?"""
    over_batch = list(_softmaxes_over_batch(run))
    for where, softmax in over_batch:
        text = f"a softmax runs over the batch: over axis {softmax.axis} of {tuple(softmax.result.shape)}"
        fix = "give softmax its dim: without, PyTorch takes axis 0 of tensors with 0, 1 or 3 axes, else axis 1"
        yield Finding(BATCH_MATES, where, WRONG, text, fix)
    found = _change_with_mates(run, routings)
    if found.verdict != FINE or not over_batch:  # one of the two says enough
        yield found


@torch.no_grad()
def _softmaxes_over_batch(run: Run) -> Iterator[tuple[str, Softmax]]:
    """The softmaxes over an axis that is as long as there are samples, also where there is one more."""
    suspects = [n for n, s in enumerate(run.calls[0].softmaxes) if s.result.shape[s.axis] == run.B]
    if not suspects:
        return

    def one_more(t: Tensor) -> Tensor:
        return torch.cat([t, t[-1:]]) if t.shape[:1] == (run.B,) else t

    try:
        more = Run.of(full_copy(run.model), *map_all_tensors(one_more, (run.args, run.kwargs))).calls[0].softmaxes
    except Exception:  # it was made for one batch size
        return
    if len(more) != len(run.calls[0].softmaxes):
        return
    seen = set()
    for n in suspects:
        softmax = run.calls[0].softmaxes[n]
        holders = [call for call in run.calls if softmax in call.softmaxes and not is_torch(call.module)]
        where = holders[-1].path if holders else ""
        if more[n].result.shape[softmax.axis] == run.B + 1 and where not in seen:
            seen.add(where)
            yield where, softmax


def map_all_tensors(function: Any, value: Any) -> Any:
    """Arguments with the function applied to every tensor."""
    return torch.utils._pytree.tree_map_only(Tensor, function, value)


@torch.no_grad()
def _change_with_mates(run: Run, routings: list[Routing]) -> Finding:
    """The change of the first sample's output, of the whole model and of each layer with larger weights."""
    if not all(t.isfinite().all() for t in floating_tensors(run.output)):
        return Finding(BATCH_MATES, "", UNKNOWN, "the model's output is not finite")
    before = Run.of(full_copy(run.model), run.args, run.kwargs)
    try:
        other = Run.of(full_copy(run.model), *_with_other_mates((run.args, run.kwargs), run.B))
    except Exception as error:
        text = f"the model does not take twice the last sample as the others: {first_line(error)}"
        return Finding(BATCH_MATES, "", UNKNOWN, text)
    change = _first_sample_changes(before.output, other.output, run.B)
    if change is None:
        return Finding(BATCH_MATES, "", UNKNOWN, "the model returns nothing with the batch on an axis")
    fix = (
        "keep the routing logits per sample, [B, I, J]: do not average the agreement over the batch, and do not "
        "normalise over the batch in evaluation"
    )
    if change > CHANGES and _varies(run.model, run.args, run.kwargs):
        return Finding(BATCH_MATES, "", UNKNOWN, DRAWN)
    if change > CHANGES:
        text = f"a sample's output changes by {100 * change:.2g} % when its batch mates change"
        return Finding(BATCH_MATES, _where_mates_mix(before, other), WRONG, text, fix)
    for routing in routings:
        for factor in ENLARGED:
            alone = _layer_mates(routing.call, factor, run.B)
            if alone > CHANGES and not _varies(routing.call.module, routing.call.args, routing.call.kwargs):
                text = f"with weights {factor:g} times as large a sample's output changes by {100 * alone:.2g} %"
                return Finding(BATCH_MATES, routing.call.path, WRONG, f"{text} when its batch mates change", fix)
    return Finding(BATCH_MATES, "", FINE, f"a sample's output changes by {change:.0e} when its batch mates change")


def _where_mates_mix(run: Run, other: Run) -> str:
    """The path of an innermost module whose output for the first sample changes, while its input does not."""
    culprits = [
        a.path
        for a, b in zip(run.calls, other.calls, strict=False)  # what is called may depend on the samples
        if a.path == b.path
        and not is_torch(a.module)
        and (_first_sample_changes(a.output, b.output, run.B) or 0) > CHANGES
        and (_first_sample_changes(a.args, b.args, run.B) or 0) <= CHANGES
    ]
    inner = [path for path in culprits if not any(is_inside(other, path) for other in culprits)]
    return inner[0] if inner else ""


def first_line(error: Exception) -> str:
    """The class of an error, and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _with_other_mates(value: Any, B: int) -> Any:
    """The first sample stays; the others become twice the last one. Labels stay what they are."""

    def others(t: Tensor) -> Tensor:
        return torch.cat([t[:1], 2 * t[-1:].expand(B - 1, *t.shape[1:])]) if t.shape[:1] == (B,) else t

    return map_floating(others, value)


def _layer_mates(call: Call, factor: float, B: int) -> float:
    """By how much a layer's output for the first sample changes with its batch mates, with weights made larger."""
    mates = _with_other_mates((call.args, call.kwargs), B)
    try:
        one, other = (
            Run.of(scaled_copy(call.module, factor), *arguments).output
            for arguments in ((call.args, call.kwargs), mates)
        )
    except Exception:  # it cannot run alone
        return 0.0
    return _first_sample_changes(one, other, B) or 0.0


def _first_sample_changes(before: Any, after: Any, B: int) -> float | None:
    """The largest relative change of the first sample over all tensors whose shape tells the batch."""
    changes = []
    for a, b in zip(floating_tensors(before), floating_tensors(after), strict=False):
        axis = batch_axis(a, B)
        if a.shape == b.shape and axis is not None:
            changes.append(_relative(a.select(axis, 0), b.select(axis, 0)))
    return max(changes, default=None)


def _relative(a: Tensor, b: Tensor) -> float:
    size = torch.linalg.vector_norm(a.double()).item()
    return torch.linalg.vector_norm((a - b).double()).item() / size if size else 0.0
