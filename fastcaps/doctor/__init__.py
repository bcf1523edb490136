"""Known mistakes of capsule networks, looked for in one's own: evidence computed on the spot, and the fix.

Nothing here reads source code, but for the line of an error. A model is run, its modules are watched, and each
suspicion is tried: does one sample's output change with its batch mates, over which capsules do the coefficients sum to
1, from how many places of the feature map is a capsule made, what happens to a zero capsule.
"""

import itertools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastcaps._deprecated import moved_module, renamed_arguments
from fastcaps.convert.failure import explain_failure
from fastcaps.convert.modules import call_arguments, floating_tensors, full_copy, random_state_kept
from fastcaps.doctor import checks, loss_checks
from fastcaps.doctor.axes import Layer, Routing, class_capsules, drawn_at_random, find_routings, layer_of_ours
from fastcaps.doctor.finding import FINE, INITIALISATION, ROUTING, RUNS, SUSPICIOUS, UNKNOWN, WRONG, Finding
from fastcaps.doctor.independence import batch_mates, kept_state
from fastcaps.doctor.primary import primary_capsules
from fastcaps.doctor.routing_checks import routing_checks
from fastcaps.doctor.watch import Run, batch_size, is_torch, routed_by_fastcaps

__all__ = ["FINE", "SUSPICIOUS", "UNKNOWN", "WRONG", "Finding", "examine", "iter_findings"]

FEWEST = 5  # samples


@renamed_arguments(margin="margin_loss", reconstruction="reconstruction_loss")
def examine(
    model: nn.Module,
    sample: Any,
    *,
    margin_loss: Callable[..., Any] | None = None,
    reconstruction_loss: Callable[..., Any] | None = None,
) -> list[Finding]:
    """Look for the known mistakes in a capsule model.

    Args:
        model: the model. It is run and copied, not changed.
        sample: what it is called with: a tensor, a tuple of positional arguments, or a dict of keyword arguments; at
            least 5 samples on the first axis of each tensor.
        margin_loss: its classification loss, a function of lengths ``[B, J]`` and labels, indices or one-hot, in
            either order; or None.
        reconstruction_loss: its reconstruction loss, a function of two batches of images; or None.

    Returns:
        A :class:`Finding` for every check, also for those that found nothing wrong; what is asked of a layer that
        routes, for each of them. A model that does not run on the sample has one finding more, and hardly another.

    Raises:
        TypeError: the model is no module.
        ValueError: the model cannot be copied, or there are too few samples.

    Example:
        >>> import fastcaps
        >>> findings = examine(fastcaps.CapsNet((1, 8, 8), 10, kernel_size=3), torch.rand(5, 1, 8, 8))
        >>> [finding.check for finding in findings if finding.verdict == "wrong"]
        []
    """
    return list(iter_findings(model, sample, margin_loss=margin_loss, reconstruction_loss=reconstruction_loss))


def iter_findings(
    model: nn.Module,
    sample: Any,
    *,
    margin_loss: Callable[..., Any] | None = None,
    reconstruction_loss: Callable[..., Any] | None = None,
) -> Iterator[Finding]:
    """The findings of :func:`examine`, each as soon as it is there.

    Args:
        model: as in :func:`examine`, and so are the others.
        sample: what the model is called with.
        margin_loss: its classification loss.
        reconstruction_loss: its reconstruction loss.

    Yields:
        One :class:`Finding` after another.

    Raises:
        TypeError: the model is no module.
        ValueError: the model cannot be copied, or there are too few samples.

    Example:
        >>> import fastcaps
        >>> next(iter_findings(fastcaps.CapsNet((1, 8, 8), 10, kernel_size=3), torch.rand(5, 1, 8, 8))).verdict
        'fine'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    arguments = call_arguments(sample)
    if batch_size(arguments) < FEWEST:
        shapes = [tuple(t.shape) for t in floating_tensors(arguments)]
        raise ValueError(f"the sample must hold at least {FEWEST} samples in floating point, got {shapes}")
    findings = _findings(model, arguments, margin_loss, reconstruction_loss)
    return _in_private(findings)


def _in_private(findings: Iterator[Finding]) -> Iterator[Finding]:
    """The same, with gradients and with random numbers of their own, which nobody sees between two findings."""
    while True:
        with random_state_kept(), torch.enable_grad():
            finding = next(findings, None)
        if finding is None:
            return
        yield finding


def _findings(
    model: nn.Module,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    margin_loss: Callable[..., Any] | None,
    reconstruction_loss: Callable[..., Any] | None,
) -> Iterator[Finding]:
    """What is found in a model and in its losses."""
    copied = _copy(model).eval()
    try:
        run = Run.of(copied, *arguments)
    except Exception as error:
        failure = explain_failure(error, copied)
        yield Finding(RUNS, failure.path, WRONG, failure.text, failure.fix)
        return
    _empty_what_has_no_shape(copied)
    _copy(copied)  # only after a call a model may hold what cannot be copied
    run = _with_unique_batch_size(run)
    yield checks.finite(run.output)
    layers = yield from _layers(run)
    layers = [layer for layer in layers if not isinstance(layer, Routing) or layer.by_agreement]
    routings = [layer for layer in layers if isinstance(layer, Routing)]
    yield kept_state(run)
    yield from batch_mates(run, routings)
    for routing in routings:
        yield from routing_checks(routing, run.B, run.around(routing.call))
    if layers:  # the others get their poses from capsules, not from a feature map
        yield from primary_capsules(run, layers[0])
    yield from checks.zero_capsules(run.calls)
    classes = class_capsules(run, layers[-1]) if layers else None
    if classes is not None and drawn_at_random(run, classes):
        yield Finding(INITIALISATION, "", UNKNOWN, "the lengths depend on random numbers, in evaluation too")
    else:
        yield checks.initialisation(run, classes)
    J = layers[-1].number if layers else None
    yield from loss_checks.losses(run, J, classes, margin_loss, reconstruction_loss)


def _copy(model: nn.Module) -> nn.Module:
    """A copy of the model.

    Raises:
        ValueError: it cannot be copied.
    """
    try:
        return full_copy(model)
    except Exception as error:
        raise ValueError(f"the model cannot be copied: {type(error).__name__}: {error}") from error


def _empty_what_has_no_shape(model: nn.Module) -> None:
    """Give parameters and buffers a shape, an empty one, that a call did not give one: nothing depends on them."""
    for tensor in (*model.parameters(), *model.buffers()):
        if is_lazy(tensor):
            tensor.materialize((0,))


def _with_unique_batch_size(run: Run) -> Run:
    """The same with as many samples as nothing else has entries, so that shapes tell the batch; else as it was."""
    B, parameters = run.B, [size for parameter in run.model.parameters() for size in parameter.shape]
    seen = [t for call in run.calls for t in floating_tensors((call.args, call.kwargs, call.output))]
    # The batch itself is one of the sizes: another number is wanted where a tensor has it twice, or a parameter has it.
    if B not in parameters and all(t.shape.count(B) < 2 for t in seen):
        return run
    taken = {*parameters, *(size for t in seen for size in t.shape)}
    other = next(n for n in itertools.count(FEWEST) if n not in taken)
    index = torch.arange(other) % B

    def resized(t: Any) -> Any:
        return t[index.to(t.device)] if isinstance(t, Tensor) and t.shape[:1] == (B,) else t

    try:
        return Run.of(run.model, *torch.utils._pytree.tree_map(resized, (run.args, run.kwargs)))
    except Exception:  # it was made for one batch size
        return run


def _layers(run: Run) -> Generator[Finding, None, list[Layer]]:
    """The layers that route, in the order in which they are called; and what is to say of what routes here."""
    fused = [call for call in run.calls if routed_by_fastcaps(call)]
    routings = find_routings(run)
    for call in fused:
        yield Finding(ROUTING, call.path, FINE, "fastcaps routes it, as in the paper and tested against float64")
    for routing in routings:
        if not routing.by_agreement:
            text = "it weighs by a softmax of what comes in, as attention does: this is no routing by agreement"
            yield Finding(ROUTING, routing.call.path, UNKNOWN, text)
    if not routings and not fused:
        yield _no_routing(run)
    layers = [*routings, *(layer_of_ours(call) for call in fused)]
    return sorted(layers, key=lambda layer: run.calls.index(layer.call))


def _no_routing(run: Run) -> Finding:
    """That nothing was found which routes."""
    softmaxes = run.calls[0].softmaxes
    if not softmaxes:
        return Finding(ROUTING, "", SUSPICIOUS, "no softmax was seen: nothing routes here, or by something else")
    holders = {}
    for softmax in softmaxes:
        paths = [call.path for call in run.calls if softmax in call.softmaxes and not is_torch(call.module)]
        holders[paths[-1] if paths else ""] = tuple(softmax.result.shape)
    where = ", ".join(f"{path or 'the model'} {shape}" for path, shape in list(holders.items())[:3])
    text = f"none of the {len(softmaxes)} softmaxes seems to weigh input capsules for output capsules: {where}"
    return Finding(ROUTING, "", UNKNOWN, text)


def __getattr__(name: str) -> Any:
    return moved_module("fastcaps.doctor", name)
