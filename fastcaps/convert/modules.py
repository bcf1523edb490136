"""Calls and copies of any module, which leave the module and the random state as they were."""

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.contents import held
from fastcaps.convert.failure import explain_failure

WRAPPERS = ("DataParallel", "DistributedDataParallel", "OptimizedModule")

Calls = dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]  # the arguments of each layer's first call


def call_arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call: a tuple is the first, a mapping the second, else there is one."""
    if isinstance(sample, tuple):
        return sample, {}
    return ((), dict(sample)) if isinstance(sample, Mapping) else ((sample,), {})


def is_floating(value: Any) -> bool:
    """Whether a value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def floating_tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in arguments or outputs, however nested."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if is_floating(leaf)]


def map_floating(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Arguments or outputs with the function applied to each floating-point tensor; all else stays as it is."""
    return torch.utils._pytree.tree_map(lambda leaf: function(leaf) if is_floating(leaf) else leaf, value)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Inside, numbers may be drawn; afterwards PyTorch's, Python's and NumPy's generators are where they were."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)


def seed_generators(seed: int) -> None:
    """Seed the generators of PyTorch, of Python and, where it was imported, of NumPy."""
    # For accelerators that may be started later, torch.manual_seed notes from where it was called, which takes long.
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module's mode and the random state are what they were."""
    training = {module: module.training for module in model.modules()}
    try:
        with random_state_kept():
            model.eval()
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def detached_copy(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy without hooks, all of whose parameters require a gradient; with a dtype, all its numbers are of that."""
    # What deepcopy is given in place of what it cannot copy: tensors with a history, and what a hook may hold.
    known: dict[int, Any] = {
        id(x): x.detach().clone() for x in held(module).values() if isinstance(x, Tensor) and not x.is_leaf
    }
    for part in module.modules():
        known |= {id(v): type(v)() for n, v in vars(part).items() if n.endswith("_hooks") and isinstance(v, dict)}
    copied = copy.deepcopy(module, known).requires_grad_()
    return copied if dtype is None else _cast(copied, dtype)


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in another dtype, with the constants that are neither parameters nor buffers."""
    module.to(dtype)
    for part in module.modules():
        for name, value in vars(part).items():
            if is_floating(value):
                vars(part)[name] = value.to(dtype)
    return module


def full_copy(model: nn.Module) -> nn.Module:
    """A copy with hooks; where the model holds tensors with a history, which deepcopy refuses, one without them."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:
        copied = detached_copy(model)
        for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        return copied


def first_calls(
    model: nn.Module,
    sample: Any,
    layers: Sequence[nn.Module],
    watch: contextlib.AbstractContextManager[Any] | None = None,
) -> Calls:
    """Run the model in evaluation mode, and keep with what each layer was called first.

    Args:
        model: the model.
        sample: what it is called with.
        layers: the layers.
        watch: the context in which it runs; where it does not run in that, it runs without.

    Raises:
        ValueError: it cannot run on the sample.
    """
    calls: Calls = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        kept = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        calls.setdefault(module, kept)

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    args, kwargs = call_arguments(sample)

    def run(context: contextlib.AbstractContextManager[Any]) -> None:
        with evaluation_mode(model), torch.no_grad(), context:
            unwrapped(model)(*args, **kwargs)

    try:
        try:
            run(watch or contextlib.nullcontext())
        except Exception:  # compiled parts of a model may not run under a watch
            if watch is None:
                raise
            calls.clear()
            run(contextlib.nullcontext())
    except Exception as error:
        raise ValueError(f"the model cannot run on the sample: {explain_failure(error, model)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers; known by name, as importing them takes seconds."""
    while type(model).__name__ in WRAPPERS:
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model
