"""Is a capsule layer what a recipe says? Old layer, new layer and recipe run side by side, forward and backward.

With small weights the coupling is nearly uniform, and one iteration and three, or a full and a detached gradient,
cannot be told apart; with large ones an epsilon in squash cannot be seen. So every comparison is made at the model's
weights, at weights so large that routing decides, and at weights so small that an epsilon counts.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastcaps.convert.contents import contents, differences, held
from fastcaps.convert.recipes import Plan, Recipe, get_path, set_path, variants
from fastcaps.exactness import error_budget, relative_error

LIMIT = 1e-9  # relative L2, float64
NORM_EPS_LIMIT = 1e-5  # what leaving norm_eps out may change
DECISIVE = 0.7  # of log J: below this entropy of the coupling, routing decides
SHORT = 1e-4  # |s| at which an epsilon of 1e-16 still changes squash by more than LIMIT
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Tensors = dict[str, Tensor]
Call = Callable[["Situation", Tensor], Any]


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes:
        refused: why the layer must not be replaced, or None.
        output: largest relative L2 difference of the outputs, old against new, at the model's weights.
        gradient: likewise of the gradients of poses and parameters.
        notes: what else there is to know.
    """

    refused: str | None
    output: float = math.nan
    gradient: float = math.nan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Situation:
    """One comparison: a copy of the old layer, and poses as the layer takes them."""

    name: str
    layer: nn.Module
    poses: Tensor
    num_iterations: int


def detached_copy(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy without hooks, in another dtype, which requires gradients of all its parameters."""
    # What deepcopy is given in place of what it cannot copy: tensors with a history, and what a hook may hold.
    known: dict[int, Any] = {
        id(x): x.detach().clone() for x in held(layer).values() if isinstance(x, Tensor) and not x.is_leaf
    }
    for module in layer.modules():
        known |= {id(v): type(v)() for n, v in vars(module).items() if n.endswith("_hooks") and isinstance(v, dict)}
    twin = copy.deepcopy(layer, known).to(dtype)
    for module in twin.modules():
        for name, value in vars(module).items():  # a constant that is neither parameter nor buffer
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.to(dtype)
    return twin.requires_grad_()


def verify(
    layer: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Recipe | None = None
) -> Verdict:
    """Compare a layer with what a recipe makes of it; the layer itself is not touched.

    Args:
        layer: the old layer.
        recipe: the recipe.
        args: positional arguments of one call of the layer.
        kwargs: its keyword arguments.
        wanted: what the new layer computes, where that is meant to be something else; None: what the recipe says.
    """
    lost = _lost(layer)
    if lost is not None:
        return Verdict(lost)
    try:
        plan = Plan.of(recipe, layer)
        poses, num_iterations = plan.bind(layer, args, kwargs)
        plan.tensors(layer, poses)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        return Verdict(f"the recipe does not fit: {error}")
    if num_iterations < 1:
        return Verdict(f"it routes {num_iterations} times")
    for dtype in (torch.float64, torch.float32):
        try:
            call = _old_call(plan, args, kwargs, dtype)
            situations = list(_situations(layer, plan, poses, num_iterations, dtype))
            first = situations[0].poses.clone()
            call(situations[0], first)
        except Exception as error:
            failed = f"the old layer cannot run alone: {type(error).__name__}: {error}"
            continue
        if first._version:
            return Verdict("its forward changes its input in place, which a converted layer would not")
        return _compare(plan, call, situations, dtype, wanted or recipe)
    return Verdict(failed)


def _lost(layer: nn.Module) -> str | None:
    """What of a layer would take no effect any more, once its class is another."""
    if "forward" in vars(layer):
        return "a forward was set on the object itself, which hides that of any class (del layer.forward removes it)"
    hooked = [path for path, module in layer.named_modules() if path and any(vars(module).get(n) for n in HOOKS)]
    return f"{', '.join(hooked)} has hooks, and a converted layer would not call it" if hooked else None


def _old_call(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Call:
    """The old layer in a situation, as a function of its poses; with the other arguments that it was called with."""

    def call(place: Situation, poses: Tensor) -> Any:
        given = [poses, *(_cast(value, dtype) for value in args[1:])]
        named = {key: _cast(value, dtype) for key, value in kwargs.items() if key != plan.arguments[0]}
        if plan.extra is not None:
            T = place.num_iterations - plan.recipe.offset
            position = plan.arguments.index(plan.extra)
            given[position : position + 1] = [T] if position < len(given) else []
            named |= {plan.extra: T} if position >= len(given) else {}
        with _default_dtype(dtype):  # many layers make their logits by torch.zeros without a dtype
            return place.layer(*given, **named)

    return call


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _situations(
    layer: nn.Module, plan: Plan, poses: Tensor, num_iterations: int, dtype: torch.dtype
) -> Iterator[Situation]:
    """Two samples, each at three scales of the weights; in training and in evaluation, which may differ."""
    x = plan.layouts["input"].canonical(poses.detach(), plan.sizes(layer), "input").to(dtype)
    I, D_in = x.shape[1:]
    generator = torch.Generator().manual_seed(0)
    sizes = {I, D_in, plan.tensors(layer, poses)["weight"].shape[1], len(x[:4])}
    B = next(n for n in (3, 4, 5, 6, 7) if n not in sizes)  # two axes of one size, or two batches, could be confused
    size = x.double().pow(2).mean().sqrt().item()
    size = size if 0 < size < math.inf else 1.0
    random = torch.randn(B, I, D_in, generator=generator, dtype=torch.float64).to(x) * size
    for name, few in (("the sample", x[:4]), ("random poses", random)):
        if not few.numel():
            continue
        sample = plan.layouts["input"].arranged(few)
        for training in (True, False):
            twin = detached_copy(layer, dtype).train(training)
            yield Situation(f"{name}, the model's weights", twin, sample, num_iterations)
        for decisive in (True, False):
            twin = detached_copy(layer, dtype)
            T = num_iterations
            if decisive and not isinstance(plan.recipe.iterations, int):
                T = max(T, 2)  # it may be changed later: one iteration alone would not tell what a second one does
                if plan.extra is None:
                    set_path(twin, plan.recipe.iterations, T - plan.recipe.offset)
            if _rescale(twin, plan, sample, T, decisive, generator):
                what = "weights that make routing decide" if decisive else "weights that make capsules short"
                yield Situation(f"{name}, {what}", twin.train(), sample, T)
                yield Situation(f"{name}, {what}", copy.deepcopy(twin).eval(), sample, T)


@torch.no_grad()
def _rescale(
    twin: nn.Module, plan: Plan, poses: Tensor, num_iterations: int, decisive: bool, generator: torch.Generator
) -> bool:
    """Scale the weights until the coupling is decided, or until |s| is about :data:`SHORT`; whether that worked."""
    weight = get_path(twin, plan.recipe.weight)
    extra = [get_path(twin, path) for path in (plan.recipe.prior, plan.recipe.bias) if path is not None]
    if decisive:
        for parameter in extra:  # what is still at its initial value would hide a mistake
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        axis = -1 if plan.recipe.softmax == "outputs" else 1
        for _ in range(64):
            c = plan.plain(twin, poses, max(num_iterations, 2)).coupling
            most = math.log(c.shape[axis]) if c.shape[axis] > 1 else math.inf
            entropy = torch.special.entr(c).sum(axis).mean().item()
            if not math.isfinite(entropy):
                return False
            if entropy < DECISIVE * most:
                return True
            weight *= 1.5
        return False
    length = plan.plain(twin, poses, num_iterations).sums.norm(dim=-1).median().item()
    if not 0 < length < math.inf:
        return False
    for parameter in [weight] + ([get_path(twin, plan.recipe.bias)] if plan.recipe.bias is not None else []):
        parameter *= SHORT / length
    return True


def _compare(plan: Plan, old_call: Call, situations: list[Situation], dtype: torch.dtype, wanted: Recipe) -> Verdict:
    recipe, new_plan = plan.recipe, Plan.of(wanted, situations[0].layer)
    dropped = bool(wanted.norm_eps) and not wanted.convention.effects
    becomes = replace(wanted, norm_eps=0.0) if dropped else wanted
    notes: list[str] = [] if dtype == torch.float64 else ["compared in float32, as the old layer cannot run in float64"]
    usable, results = [], []
    for place in situations:
        before = contents(place.layer)
        old = _gradients(lambda x: old_call(place, x), place.layer, place.poses)  # noqa: B023
        changed = differences(before, contents(place.layer))
        if changed:
            return Verdict(f"its forward also sets {', '.join(changed)}, which a converted layer would not")
        shape = _shape_error(plan, old, place)
        if shape:
            return Verdict(shape)
        finite = _finite_rows(plan, place, old)
        if not finite.all():
            count = f"{int((~finite).sum())} of {len(finite)} samples"
            note = f"{place.name}: the old layer gives NaN or infinity for {count}, which are not compared"
            notes += [note] if "model's" in place.name else []
            if recipe.logits == "batch" or not finite.any():
                continue
            layout = plan.layouts["input"]
            rows = layout.canonical(place.poses, plan.sizes(place.layer), "input")[finite]
            place = replace(place, poses=layout.arranged(rows))
            old = _gradients(lambda x: old_call(place, x), place.layer, place.poses)  # noqa: B023
            if not all(t.isfinite().all() for t in old.values()):
                continue
        usable.append(place)
        results.append(old)
    decided = [place for place in usable if "decide" in place.name]
    if not decided:
        return Verdict(
            "no weights were found for which the old layer is finite and its routing decides", notes=tuple(notes)
        )
    worst, own, left_out = (0.0, 0.0), (0.0, 0.0), 0.0
    for place, old in zip(usable, results, strict=True):
        new = _gradients(lambda x: _new(new_plan, place, x), place.layer, place.poses)  # noqa: B023
        said = _twin(recipe, place)
        if not _close(old, said, recipe, place, dtype):
            reason = _diagnosis(recipe, situations[0].num_iterations, usable, results, dtype)
            return Verdict(reason, *_largest(old, new), tuple(notes))
        exact = said if becomes == recipe else _twin(becomes, place)
        if not _close(new, exact, becomes, place, dtype):
            return Verdict(f"fastcaps itself is wrong here ({place.name}): please report this", *_largest(old, new))
        own = _larger(own, _largest(exact, new))
        if "model's" in place.name:
            worst = _larger(worst, _largest(old, new))
            if dropped:  # by the twins in float64: in float32, rounding would hide or feign it
                left_out = max(left_out, *_largest(_twin(wanted, place), exact))
    if dropped:
        notes.append(f"the {recipe.norm_eps:g} that squash adds to the norm is left out")
        if not left_out <= NORM_EPS_LIMIT:
            reason = f"capsules are so short that the {recipe.norm_eps:g} which squash adds to the norm matters"
            return Verdict(reason, *worst, tuple(notes))
    if wanted != recipe:
        text = "the errors of this row are from the old layer; from the paper's routing in plain PyTorch they are"
        notes.append(f"{text} {own[0]:.0e} and {own[1]:.0e}")
    return Verdict(None, *worst, tuple(notes))


def _new(plan: Plan, place: Situation, x: Tensor) -> Any:
    recipe = plan.recipe
    given: dict[str, Any] = {plan.arguments[0]: x}
    if plan.extra is not None:
        given[plan.extra] = place.num_iterations - recipe.offset
    return plan.call(place.layer, (), given)


def _twin(recipe: Recipe, place: Situation, dtype: torch.dtype = torch.float64) -> Tensors:
    """What the recipe says, step by step in plain PyTorch: by default in float64 on the same numbers."""
    layer = detached_copy(place.layer, dtype)
    plan = Plan.of(recipe, layer)

    def call(x: Tensor) -> Any:
        routed = plan.plain(layer, x, place.num_iterations)
        out = plan.layouts["output"].arranged(routed.poses)
        return (out, plan.layouts["coupling"].arranged(routed.coupling)) if "coupling" in plan.layouts else out

    return _gradients(call, layer, place.poses.to(dtype))


def _gradients(call: Callable[[Tensor], Any], layer: nn.Module, poses: Tensor) -> Tensors:
    """Outputs and gradients of poses and parameters for one fixed incoming gradient."""
    x = poses.clone().requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    with torch.enable_grad():
        out = call(x)
    parts = out if type(out) is tuple and len(out) == 2 else (out,)
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"it returns {_kinds(out)}, and a converted layer a tensor or a tuple of two")
    outputs = dict(zip(("output", "coupling"), parts, strict=False))
    generator = torch.Generator().manual_seed(1)
    sent = {n: torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for n, o in outputs.items()}
    differentiable = [n for n, o in outputs.items() if o.requires_grad]
    grads = torch.autograd.grad(
        [outputs[n] for n in differentiable], [x, *parameters], [sent[n] for n in differentiable], allow_unused=True
    )
    named = zip(("poses", *names), grads, (x, *parameters), strict=True)
    grads_by_name = {f"gradient of {n}": torch.zeros_like(p) if g is None else g for n, g, p in named}
    return {n: o.detach() for n, o in outputs.items()} | grads_by_name


def _kinds(out: Any) -> str:
    """The types of what a layer returns, in words."""
    inner = f" of {', '.join(type(part).__name__ for part in out)}" if isinstance(out, (tuple, list)) else ""
    return f"{type(out).__name__}{inner}"


def _shape_error(plan: Plan, old: Tensors, place: Situation) -> str | None:
    tensors = plan.tensors(place.layer, place.poses)
    (B, I, _), (J, D_out) = tensors["poses"].shape, tensors["weight"].shape[1:3]
    wanted = {"output": plan.layouts["output"].arranged(place.poses.new_empty(B, J, D_out)).shape}
    if "coupling" in plan.layouts:
        wanted["coupling"] = plan.layouts["coupling"].arranged(place.poses.new_empty(B, I, J)).shape
    for name in ("output", "coupling"):
        got = tuple(old[name].shape) if name in old else None
        if got != (tuple(wanted[name]) if name in wanted else None):
            return (
                f"{name}: the old layer returns {got or 'none'}, the recipe's {tuple(wanted.get(name, ())) or 'none'} "
                "(most likely the flag output)"
            )
    return None


def _finite_rows(plan: Plan, place: Situation, old: Tensors) -> Tensor:
    """``[B]`` bool: the samples whose output and whose gradient of the poses are finite."""
    sizes = plan.sizes(place.layer)
    grad = plan.layouts["input"].canonical(old["gradient of poses"], dict(sizes), "input")
    out = plan.layouts["output"].canonical(old["output"], dict(sizes), "output")
    return grad.isfinite().flatten(1).all(1) & out.isfinite().flatten(1).all(1)


def _errors(value: Tensors, exact: Tensors) -> dict[str, float]:
    if value.keys() != exact.keys() or any(value[n].shape != exact[n].shape for n in exact):
        return dict.fromkeys(exact, math.inf)
    return {n: relative_error(value[n], exact[n]) for n in exact}


def _close(value: Tensors, exact: Tensors, recipe: Recipe, place: Situation, dtype: torch.dtype) -> bool:
    """Whether all errors are within their limits; below float64 these are what plain PyTorch needs in that dtype."""
    allowed = dict.fromkeys(exact, LIMIT)
    if dtype != torch.float64:
        own = _errors(_twin(recipe, place, dtype), exact)
        allowed = {n: error_budget(dtype, own[n], gradient=n.startswith("gradient")) for n in exact}
    return all(error <= allowed[n] for n, error in _errors(value, exact).items())


def _largest(old: Tensors, new: Tensors) -> tuple[float, float]:
    errors = _errors(new, old)
    gradient = {n: e for n, e in errors.items() if n.startswith("gradient")}
    return max(e for n, e in errors.items() if n not in gradient), max(gradient.values())


def _larger(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return max(a[0], b[0]), max(a[1], b[1])


# ------------------------------------------------------------------------------------------- in which flag it lies


def _diagnosis(
    recipe: Recipe, num_iterations: int, situations: list[Situation], results: list[Tensors], dtype: torch.dtype
) -> str:
    """Which single change of the recipe explains the old layer."""
    best, closest, unchanged = "", math.inf, _worst(recipe, recipe, situations, results, math.inf)
    for text, variant in variants(recipe, num_iterations):
        worst = _worst(recipe, variant, situations, results, closest)
        if worst < closest:
            best, closest = text, worst
    if closest <= (LIMIT if dtype == torch.float64 else 1e-4):
        return f"it differs; most likely {best} (with that the difference is {closest:.0e})"
    hint = f"; the closest is {best} (difference {closest:.0e})" if closest < unchanged / 10 else ""
    return f"it differs by {unchanged:.0e}, and no single flag explains it{hint}"


def _worst(
    recipe: Recipe, variant: Recipe, situations: list[Situation], results: list[Tensors], enough: float
) -> float:
    """The largest difference between the old layer and a variant; it stops where ``enough`` is reached."""
    worst = 0.0
    for place, old in zip(situations, results, strict=True):
        T = place.num_iterations + variant.offset - recipe.offset
        try:
            exact = _twin(variant, replace(place, num_iterations=T))
        except (ValueError, RuntimeError, AttributeError):  # a layout that does not fit
            return math.inf
        worst = max(worst, max(_errors(old, exact).values(), default=math.inf))
        if not worst < enough:
            break
    return worst
