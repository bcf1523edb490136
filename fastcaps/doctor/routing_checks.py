"""The checks of a layer that routes: its couplings, its squash, its output capsules."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.contents import PLAIN
from fastcaps.convert.modules import floating_tensors, map_floating, seed_generators
from fastcaps.doctor.axes import Routing
from fastcaps.doctor.finding import (
    AGREEMENT,
    DISTINCT,
    FINE,
    ITERATIONS,
    SOFTMAX_AXIS,
    SQUASH_AXIS,
    SUSPICIOUS,
    UNKNOWN,
    WRONG,
    Finding,
)
from fastcaps.doctor.trials import BATCH, ENTRIES, INPUTS, OUTPUTS, Trial, scaled_copy, unit_lengths
from fastcaps.doctor.watch import Call, Softmax, batch_axis, is_torch

CHANGES = 1e-4  # relative: what rounding cannot explain in float32
LARGE = 1e3  # factor of poses and weights after which squash gives length 1
MOST_ITERATIONS = 20  # a larger attribute is no number of iterations


def routing_checks(routing: Routing, B: int, around: list[Call]) -> Iterator[Finding]:
    """Everything that is asked of a layer that routes."""
    yield softmax_axis(routing)
    yield iterations(routing, around)
    yield agreement(routing, B)
    yield squash_axis(routing, B)
    yield distinct(routing)


def softmax_axis(routing: Routing) -> Finding:
    """Over which capsules does the coupling sum to 1, in each pass?"""
    where, passes, T = routing.call.path, routing.passes, len(routing.passes)
    overs = [_summed_over(routing, softmax) for softmax in passes]
    t = next((t for t in reversed(range(T)) if overs[t] not in (OUTPUTS, "")), None)
    if t is None:
        size = passes[-1].result.shape[passes[-1].axis]
        if "" in overs:
            text = f"it runs over an axis of {size}: what that stands for was not found"
            return Finding(SOFTMAX_AXIS, where, UNKNOWN, text)
        if routing.capsules is None:
            text = f"it runs over an axis of {size}, but several axes lead to places of the output"
            return Finding(SOFTMAX_AXIS, where, UNKNOWN, text)
        return Finding(SOFTMAX_AXIS, where, FINE, f"the coupling sums to 1 over {size} output capsules")
    size = passes[t].result.shape[passes[t].axis]
    if T == 1 and routing.constant_start and not _uniform(passes[0].result):
        text = f"one softmax over {size} {overs[t]}: with one pass it may be meant to be another weighting"
        return Finding(SOFTMAX_AXIS, where, UNKNOWN, text)
    some = f"in pass {t + 1} of {T} " if overs.count(overs[t]) < T else ""
    over = "an axis of 1, so each coupling is 1" if size == 1 else f"the {size} {overs[t]}"
    J = routing.number
    text = f"{some}the coupling sums to 1 over {over}"
    if J is not None:
        total = passes[t].result.mean().item() * J
        text = f"{text}; over the {J} output capsules it sums to {total:.2g} on average"
    return Finding(
        SOFTMAX_AXIS, where, WRONG, text,
        "softmax over the axis of the output capsules: an input capsule gives away 1 in all. With the right axis large "
        "initial weights saturate squash: use a deviation of sqrt(J / (I D_out)) at most",
    )  # fmt: skip


def _summed_over(routing: Routing, softmax: Softmax) -> str:
    """What the axis of a softmax stands for; empty where that was not found. Axes are counted from the last one."""
    last = routing.passes[-1].result
    axis = last.dim() - softmax.result.dim() + softmax.axis
    size = softmax.result.shape[softmax.axis]
    if size == 1:
        return "capsules"
    if axis < 0 or size != last.shape[axis]:
        return ""
    return {BATCH: "samples of the batch"}.get(routing.roles.get(axis, ""), routing.roles.get(axis, ""))


def _uniform(c: Tensor) -> bool:
    return bool((c.max() - c.min()) <= CHANGES * c.abs().max())


@torch.no_grad()
def iterations(routing: Routing, around: list[Call]) -> Finding:
    """How often the coupling is computed, beside the attribute of the layer on which that depends."""
    where, done = routing.call.path, len(routing.passes) + routing.follows_a_sum
    if done == 1:
        return Finding(
            ITERATIONS, where, SUSPICIOUS, "the coupling is computed once: without learned logits it is uniform",
            "route 2 or 3 times, unless the uniform sum is meant",
        )  # fmt: skip
    counts = dict(_counts([routing.call, *around]))
    # Logits that come in may be those of a second pass, where it was not found that these follow a first one.
    accepted = (done,) if routing.constant_start or routing.follows_a_sum else (done, done + 1)
    if counts and not set(accepted) & set(counts.values()):
        name, value = next(iter(counts.items()))
        return Finding(
            ITERATIONS, where, WRONG, f"{name} is {value}, but the coupling is computed {done} times",
            f"count the couplings: what others call {value} iterations is {name}={2 * value - done} here",
        )  # fmt: skip
    text = f"the coupling is computed {done} times" + ("" if counts else "; no attribute says how often")
    return Finding(ITERATIONS, where, FINE, text)


def _counts(calls: list[Call]) -> Iterator[tuple[str, int]]:
    """The attributes of the innermost module of these on which the number of softmaxes depends, and their values."""
    for call in calls:
        try:
            trial = Trial(call)
            before = len(trial.run().softmaxes)
        except Exception:  # it cannot run alone, or not on random poses
            return
        found = False
        for holder, name, value in _whole_numbers(trial.module):
            setattr(holder, name, value + 1)
            try:
                counts = len(trial.run().softmaxes) != before
            except Exception:  # it was a size
                counts = False
            setattr(holder, name, value)
            if counts:
                found = True
                yield name, value
        if found:
            return


def _whole_numbers(module: nn.Module) -> Iterator[tuple[Any, str, int]]:
    """The attributes of a module and of its options that may be a number of iterations."""
    holders = [m for m in module.modules() if not is_torch(m)]
    options = [v for m in holders for v in vars(m).values() if not isinstance(v, (*PLAIN, Tensor)) and _has_options(v)]
    for holder in [*holders, *options]:
        for name, value in {**vars(type(holder)), **vars(holder)}.items():
            if type(value) is int and 1 <= value <= MOST_ITERATIONS:
                yield holder, name, value


def _has_options(value: Any) -> bool:
    """Whether an object is like a namespace of options."""
    return hasattr(value, "__dict__") and not callable(value)


def agreement(routing: Routing, B: int) -> Finding:
    """Has a coupling one value for each pair of capsules, as a scalar product has?"""
    where, c = routing.call.path, routing.last.result
    for axis, role in routing.roles.items():
        if role == ENTRIES and (c.amax(axis) - c.amin(axis)).max() > CHANGES * c.abs().max():
            return Finding(
                AGREEMENT, where, WRONG, f"each of the {c.shape[axis]} entries of a pose has a coupling of its own",
                "sum the product of vote and output over the entries of the pose: the agreement is [B, I, J]",
            )  # fmt: skip
    pairs = math.prod(c.shape[axis] for axis, role in routing.roles.items() if role in (BATCH, INPUTS, OUTPUTS))
    if routing.poses is not None and routing.number is not None:
        I = routing.poses.canonical().shape[1]
        if pairs > B * I * routing.number:
            return Finding(AGREEMENT, where, UNKNOWN, "several axes are flattened into one of the coupling")
    return Finding(AGREEMENT, where, FINE, "a coupling is one number for each input and output capsule")


@torch.no_grad()
def squash_axis(routing: Routing, B: int) -> Finding:
    """With inputs scaled up, whatever squash takes the length of has length 1."""
    call, J = routing.call, routing.number
    fix = "squash over the axis of the pose's entries, the last of [B, J, D_out]"
    if routing.squashed_together:
        text = f"one output capsule rescales the others: squash takes the norm over the {J} output capsules"
        return Finding(SQUASH_AXIS, call.path, WRONG, text, fix)

    def large(t: Tensor) -> Tensor:
        return t * (LARGE / t.float().pow(2).mean().sqrt().clamp(min=1e-30)).to(t.dtype)

    args, kwargs = map_floating(large, (call.args, call.kwargs))
    seed_generators(0)
    try:
        y = floating_tensors(scaled_copy(call.module, LARGE)(*args, **kwargs))[routing.output]
    except Exception as error:
        return Finding(SQUASH_AXIS, call.path, UNKNOWN, f"the layer cannot run alone: {error}")
    if not y.isfinite().all() or not y.any():
        return Finding(SQUASH_AXIS, call.path, UNKNOWN, "its output is not finite, or 0, for large inputs")
    axes = [axis for axis, size in enumerate(y.shape) if size > 1]
    samples, entries = batch_axis(y, B), [axis for axis in axes if axis not in (batch_axis(y, B), routing.capsules)]
    if not entries:
        return Finding(SQUASH_AXIS, call.path, UNKNOWN, f"it returns {tuple(y.shape)}: no poses, but their lengths")
    unit = [axis for axis in axes if unit_lengths(torch.linalg.vector_norm(y, dim=axis))]
    right = [axis for axis in unit if axis in entries]
    if right:
        return Finding(SQUASH_AXIS, call.path, FINE, f"large poses get length 1 over an axis of {y.shape[right[-1]]}")
    if routing.capsules in unit:
        text = f"large outputs get length 1 over the axis of the {J} output capsules"
        return Finding(SQUASH_AXIS, call.path, WRONG, text, fix)
    if samples in unit:
        return Finding(SQUASH_AXIS, call.path, WRONG, f"large outputs get length 1 over the {B} samples", fix)
    if unit_lengths(y.abs()):
        text = f"single entries get length 1: squash takes the norm over an axis of size 1 (output {tuple(y.shape)})"
        return Finding(SQUASH_AXIS, call.path, WRONG, text, fix)
    return Finding(SQUASH_AXIS, call.path, SUSPICIOUS, "large outputs get length 1 over no axis", fix)


def distinct(routing: Routing) -> Finding:
    """Do the output capsules differ from each other?"""
    where, y = routing.call.path, floating_tensors(routing.call.output)[routing.output].detach()
    if routing.capsules is None or not y.isfinite().all() or not y.any():
        return Finding(DISTINCT, where, UNKNOWN, "the output capsules are not known, not finite, or 0")
    y = y.movedim(routing.capsules, 0)
    change = ((y - y[:1]).abs().max() / y.abs().max()).item()
    if len(y) > 1 and change <= CHANGES:
        return Finding(
            DISTINCT, where, WRONG, f"all {len(y)} output capsules are equal",
            "with one matrix for all output capsules, start from different routing logits: a learned or random prior",
        )  # fmt: skip
    return Finding(DISTINCT, where, FINE, f"they differ by up to {100 * change:.2g} % of the largest entry")
