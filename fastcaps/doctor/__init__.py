"""Known mistakes of capsule networks, looked for in one's own: evidence computed on the spot, and the fix.

Nothing here reads source code. A model is run, its modules are watched, and each suspicion is tried: does one sample's
output change with its batch mates, over which capsules do the coefficients sum to 1, from how many places of the
feature map is a capsule made, what happens to a zero capsule.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps._deprecated import moved_module, renamed_arguments
from fastcaps.convert.modules import call_arguments, evaluation_mode, floating_tensors, full_copy
from fastcaps.doctor import checks, loss_checks
from fastcaps.doctor.finding import FINE, ROUTING, SUSPICIOUS, UNKNOWN, WRONG, Finding
from fastcaps.doctor.watch import Run, batch_size, find_routings, input_capsules, layer_of, routed_by_fastcaps

__all__ = ["FINE", "SUSPICIOUS", "UNKNOWN", "WRONG", "Finding", "examine"]

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
        routes, for each of them.

    Raises:
        ValueError: the model cannot run on the sample or be copied, or there are too few samples.

    Example:
        >>> import fastcaps
        >>> findings = examine(fastcaps.CapsNet((1, 8, 8), 10, kernel_size=3), torch.rand(5, 1, 8, 8))
        >>> [finding.check for finding in findings if finding.verdict == "wrong"]
        []
    """
    arguments = call_arguments(sample)
    if batch_size(arguments) < FEWEST:
        shapes = [tuple(t.shape) for t in floating_tensors(arguments)]
        raise ValueError(f"the sample must hold at least {FEWEST} samples in floating point, got {shapes}")
    with evaluation_mode(model), torch.enable_grad():
        torch.manual_seed(0)
        run = _first_run(model, *arguments)
        return [*_checks(run), *loss_checks.losses(run.output, run.B, margin_loss, reconstruction_loss)]


def _first_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """The model's run on the sample, or on more of it."""
    try:
        run = Run.of(model, args, kwargs)
    except Exception as error:
        raise ValueError(f"the model cannot run on the sample: {type(error).__name__}: {error}") from error
    try:
        full_copy(model)  # only after a call a model may hold what cannot be copied
    except Exception as error:
        raise ValueError(f"the model cannot be copied: {type(error).__name__}: {error}") from error
    return _with_unique_batch_size(run)


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


def _checks(run: Run) -> Iterator[Finding]:
    """What is looked for in the model itself."""
    yield checks.finite(run.output)
    fused = [call for call in run.calls if routed_by_fastcaps(call)]
    routings = find_routings([call for call in run.calls if call not in fused], run.B)
    for call in fused:
        yield Finding(ROUTING, call.path, FINE, "fastcaps routes it, as in the paper and tested against float64")
    if not routings and not fused:
        text = "no softmax over capsules was seen: nothing routes here, or by a softmax written by hand"
        yield Finding(ROUTING, "", SUSPICIOUS, text)
    yield checks.batch_mates(run, routings)
    for routing in routings:
        yield checks.softmax_axis(routing)
        yield checks.iterations(routing, run.calls)
        yield checks.squash_axis(routing, run.B)
    layers = [layer_of(routing.call, run.calls) for routing in routings]
    first = min([*layers, *fused], key=run.calls.index, default=None)
    if first is not None:  # the others get their poses from capsules, not from a feature map
        counts = (routing.inputs for routing, layer in zip(routings, layers, strict=True) if layer is first)
        yield from checks.primary_capsules(run, first, next(counts, input_capsules(first)))
    yield from checks.zero_capsules(run.calls)
    yield checks.initialisation(run)


def __getattr__(name: str) -> Any:
    return moved_module("fastcaps.doctor", name)
