"""What is known to go wrong in capsule networks, looked for in one's own: evidence computed on the spot, and the fix.

Nothing here reads source code. A model is run, its modules are watched, and each suspicion is tried: does one sample's
output change with its batch mates, over which capsules do the coefficients sum to 1, from how many places of the
feature map is a capsule made, what happens to a zero capsule.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.doctor import checks
from fastcaps.doctor.finding import FINE, SUSPICIOUS, UNKNOWN, WRONG, Finding
from fastcaps.doctor.loss_checks import losses
from fastcaps.doctor.watch import (
    Watch,
    batch_size,
    find_routings,
    input_capsules,
    layer_of,
    routed_by_fastcaps,
    tensors,
)

__all__ = ["FINE", "SUSPICIOUS", "UNKNOWN", "WRONG", "Finding", "examine"]

FEWEST = 5  # samples


def examine(
    model: nn.Module,
    sample: Any,
    *,
    margin: Callable[..., Tensor] | None = None,
    reconstruction: Callable[..., Tensor] | None = None,
) -> list[Finding]:
    """Look for the known mistakes in a capsule model.

    Args:
        model: the model. It is run and copied, not changed.
        sample: what it is called with: a tensor, a tuple of positional arguments, or a dict of keyword arguments; at
            least 5 samples on the first axis of each tensor.
        margin: its classification loss, a function of lengths ``[B, J]`` and labels, indices or one-hot, in either
            order; or None.
        reconstruction: its reconstruction loss, a function of two batches of images; or None.

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
    args, kwargs = (
        (sample, {}) if isinstance(sample, tuple) else ((), sample) if isinstance(sample, Mapping) else ((sample,), {})
    )
    B = batch_size((args, kwargs))
    if B < FEWEST:
        shapes = [tuple(t.shape) for t in tensors((args, kwargs))]
        raise ValueError(f"the sample must hold at least {FEWEST} samples in floating point, got {shapes}")
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))), torch.enable_grad():
            torch.manual_seed(0)
            return list(_checks(model, args, dict(kwargs), B, margin, reconstruction))
    finally:
        for module, mode in training.items():
            module.training = mode


def _with_another_batch(
    model: nn.Module, args: Any, kwargs: dict[str, Any], B: int, watch: Watch, output: Any
) -> tuple[Any, dict[str, Any], int, Watch, Any]:
    """The same with as many samples as nothing else has entries, so that shapes tell the batch; else as it was."""
    seen = [t for call in watch.calls for t in tensors((call.args, call.kwargs, call.output))]
    sizes = [size for t in seen for size in t.shape] + [size for p in model.parameters() for size in p.shape]
    # The batch itself is one of the sizes: another number is wanted where a tensor has it twice, or a parameter has it.
    if B not in [size for p in model.parameters() for size in p.shape] and all(t.shape.count(B) < 2 for t in seen):
        return args, kwargs, B, watch, output
    other = next(n for n in range(FEWEST, 10**6) if n not in sizes)
    index = torch.arange(other) % B

    def resized(t: Any) -> Any:
        return t[index.to(t.device)] if isinstance(t, Tensor) and t.shape[:1] == (B,) else t

    new_args, new_kwargs = torch.utils._pytree.tree_map(resized, (args, kwargs))
    again = Watch(model)
    try:
        return new_args, new_kwargs, other, again, again.run(*new_args, **new_kwargs)
    except Exception:  # it was made for one batch size
        return args, kwargs, B, watch, output


def _checks(
    model: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    B: int,
    margin: Callable[..., Tensor] | None,
    reconstruction: Callable[..., Tensor] | None,
) -> Iterator[Finding]:
    watch = Watch(model)
    try:
        output = watch.run(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"the model cannot run on the sample: {type(error).__name__}: {error}") from error
    try:
        checks.copied(model)  # only after a call a model may hold what cannot be copied
    except Exception as error:
        raise ValueError(f"the model cannot be copied: {type(error).__name__}: {error}") from error
    args, kwargs, B, watch, output = _with_another_batch(model, args, kwargs, B, watch, output)
    yield checks.finite(output)
    fused = [call for call in watch.calls if routed_by_fastcaps(call)]
    routings = find_routings([call for call in watch.calls if call not in fused], B)
    for call in fused:
        yield Finding("routing", call.path, FINE, "fastcaps routes it, as in the paper and tested against float64")
    if not routings and not fused:
        text = "no softmax over capsules was seen: nothing routes here, or by a softmax written by hand"
        yield Finding("routing", "", SUSPICIOUS, text)
    yield checks.batch_mates(model, args, kwargs, output, watch, routings)
    for routing in routings:
        yield checks.softmax_axis(routing)
        yield checks.iterations(routing, watch.calls)
        yield checks.squash_axis(routing, B)
    first = min([layer_of(r.call, watch.calls) for r in routings] + fused, key=watch.calls.index, default=None)
    if first is not None:  # the others get their poses from capsules, not from a feature map
        I = next((r.inputs for r in routings if layer_of(r.call, watch.calls) is first), input_capsules(first))
        yield from checks.primary_capsules(model, args, kwargs, watch.calls, first, I, B)
    yield from checks.zero_capsules(watch.calls)
    yield checks.initialisation(model, args, kwargs, output, B)
    yield from losses(output, B, margin, reconstruction)
