"""What replace_capsules leaves as it is, and why: bad input, and layers that do more than route."""

import copy
import dataclasses
import inspect
import threading

import numpy as np
import pytest
import torch
from peers import (
    seed,
    xifengguo,
)
from support.layers_to_convert import BY_NAME, D_IN, D_OUT, LAYERS, WRONG, I, J, gradients, poses_for, quietly
from torch import nn

import fastcaps
from fastcaps.convert import RECIPES, ConvertedCapsules, Recipe, replace_capsules
from fastcaps.convert.diagnosis import variants

# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_model_without_capsules():
    report = replace_capsules(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3))
    assert report.replaced == []
    assert str(report) == "no capsule layer was recognised among 2 modules; nothing was changed"


def test_recipes_of_one_class_are_tried_in_turn_ones_own_first():
    other = dataclasses.replace(BY_NAME["capsule"], name="other", detach=True)
    mine = dataclasses.replace(BY_NAME["capsule"], name="mine")
    for recipes, chosen in (((*RECIPES, other), "capsule"), ((*RECIPES, mine), "mine"), ((other, mine), "mine")):
        layer = LAYERS["capsule"]()
        report = quietly(layer, torch.randn(3, I, D_IN), recipes=recipes)
        assert report.replaced == [""]
        assert report.layers[0].recipe == chosen
        assert ("recipe 'other' was tried before: it differs by" in str(report)) == (other in recipes)
    another = dataclasses.replace(other, name="another", axes="1 J I D_out D_in")
    report = quietly(LAYERS["capsule"](), torch.randn(3, I, D_IN), recipes=(another, other))
    assert report.replaced == []
    assert "most likely detach=False instead of True" in report.layers[0].reason
    assert any("recipe 'another': the recipe does not fit: " in note for note in report.layers[0].notes)


def test_ones_own_recipe_wins_over_a_known_class_name():
    class DigitCaps(nn.Module):
        """[B, I, D_in] -> [B, J, D_out]; the name of several known layers, and axes of its own."""

        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(1, I, J, D_IN, D_OUT))

        def forward(self, x):
            u = torch.einsum("bik,ijkd->bijd", x, self.W[0])
            b = torch.zeros_like(u[..., 0])
            for _ in range(3):
                s = torch.einsum("bij,bijd->bjd", b.softmax(2), u)
                n = s.norm(dim=-1, keepdim=True)
                v = s * n / (1 + n * n)
                b = b + torch.einsum("bijd,bjd->bij", u, v)
            return v

    mine = Recipe("mine", "DigitCaps", weight="W", axes="1 I J D_in D_out")
    for recipes in ((mine,), (*RECIPES, mine), (mine, *RECIPES)):
        report = quietly(nn.Sequential(DigitCaps()), torch.randn(4, I, D_IN), recipes=recipes)
        assert report.replaced == ["0"]
        assert report.layers[0].recipe == "mine"
    report = quietly(nn.Sequential(DigitCaps()), torch.randn(4, I, D_IN))
    assert report.replaced == []
    assert "the recipe does not fit" in report.layers[0].reason
    assert "axes='1 I J D_in D_out'" in report.layers[0].notes[-1]  # what would, found by trying


def test_a_sample_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"the model cannot run on the sample: .*Error"):
        replace_capsules(LAYERS["capsule"](), torch.randn(3, I + 1, D_IN))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: replace_capsules(3, torch.ones(1)), TypeError, "model must be a module, got int"),
        (
            lambda: replace_capsules(nn.Linear(1, 1), 0, recipes=["seed"]),
            TypeError,
            "must be Recipe objects, got 'seed'",
        ),
        (lambda: Recipe("a", "A", "W", "I J K"), ValueError, "axes must be made of I, J, D_out, D_in, 1"),
        (lambda: Recipe("a", "A", "W", "I J D_in"), ValueError, "axes must name D_in and D_out"),
        (
            lambda: Recipe("a", "A", "W", "I D_in D_out", softmax="J"),
            ValueError,
            "softmax must be 'outputs' or 'inputs'",
        ),
        (lambda: Recipe("a", "A", "W", "I D_in D_out", output="B J"), ValueError, "must name B and J and D_out"),
        (lambda: Recipe("a", "A", "W", "I D_in D_out", eps=-1.0), ValueError, "eps must be finite"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_layer_that_the_sample_does_not_reach():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LAYERS["capsule"]()

        def forward(self, x):
            return x

    assert "did not call it on this sample" in str(quietly(Unused(), torch.randn(3, I, D_IN)))


def test_a_layer_of_the_same_class_with_other_parameters():
    class Capsule(seed.Capsule):
        def __init__(self):
            super().__init__(I, D_IN, J, D_OUT, 3)
            self.gain = nn.Parameter(torch.ones(1))

    text = str(quietly(Capsule(), torch.randn(3, I, D_IN)))
    assert "recipe 'capsule' knows this class, but its parameters are weights, gain, not weights" in text


def test_a_layer_of_another_name_is_pointed_out():
    class Renamed(xifengguo.DenseCapsule):
        pass

    text = str(quietly(Renamed(I, D_IN, J, D_OUT), torch.randn(3, I, D_IN)))
    assert "recipe 'xifengguo' describes it, but does not know its class" in text
    assert "classes='Renamed'" in text


def test_a_layer_whose_forward_leaves_something_behind():
    class Capsule(seed.Capsule):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    layer = Capsule(I, D_IN, J, D_OUT, 3)
    layer(torch.randn(3, I, D_IN))  # holds a tensor with a history, which deepcopy refuses
    report = quietly(layer, torch.randn(3, I, D_IN))
    assert "its forward also sets last" in report.layers[0].reason


def test_a_model_that_cannot_take_the_new_layer_gets_the_old_one_back():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LAYERS["capsule"]()

        def forward(self, x):
            if type(self.layer) is not seed.Capsule:
                raise RuntimeError("only the real one")
            return self.layer(x)

    model = Model()
    report = quietly(model, torch.randn(3, I, D_IN))
    assert type(model.layer) is seed.Capsule
    assert "_fastcaps_plan" not in vars(model.layer)
    assert "no longer runs: the model cannot run on the sample: RuntimeError: only the real one" in str(report)


@pytest.mark.parametrize("name", ["gram-ai", "adambielski", "danielhavir"])
def test_nan_of_the_old_layer_is_reported_not_compared(name):
    """A sample of zero capsules: NaN there, 0 here."""
    layer, x = LAYERS[name](), poses_for(name)
    x[1] = 0
    report = quietly(layer, x)
    assert report.replaced == [""]
    assert "the old layer gives NaN or infinity for 1 of 4 samples" in str(report)
    if name != "gram-ai":
        assert all(t.isfinite().all() for t in gradients(layer, x))


# ---------------------------------------------------------------------------- what a converted layer would not do


def named_capsule(forward, **attributes):
    """A layer of the recipe "capsule" with another forward, which may call ``seed.Capsule.forward``."""
    layer = type("Capsule", (seed.Capsule,), {"forward": forward})(I, D_IN, J, D_OUT, 3)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def refusal(layer, x=None, **options):
    """Why a layer is left as it was, in a model whose first layer is converted."""
    model = nn.ModuleList([LAYERS["capsule"](), layer])
    model.forward = lambda x: [inner(x.clone()) for inner in model]
    report = quietly(model, torch.randn(4, I, D_IN) if x is None else x, **options)
    assert report.replaced == ["0"]
    assert not isinstance(layer, ConvertedCapsules)
    assert str(report)
    return report.layers[1].reason


def test_a_forward_of_the_object_itself():
    layer = LAYERS["capsule"]()
    layer.forward = lambda x: 2 * seed.Capsule.forward(layer, x)
    assert "a forward was set on the object itself" in refusal(layer)
    layer = LAYERS["capsule"]()
    layer.forward = layer.forward  # even if it is the same
    assert "a forward was set on the object itself" in refusal(layer)


class Meter:
    def __init__(self):
        self.count, self.values = 0, np.zeros(2)


SIDE_EFFECTS = {
    "seen": (lambda layer, v: layer.seen.append(0), []),
    "poses": (lambda layer, v: layer.poses.append(v), []),
    "calls": (lambda layer, v: setattr(layer, "calls", layer.calls + 1), 1000),
    "rows": (lambda layer, v: setattr(layer, "rows", len(v)), 4),
    "by_size": (lambda layer, v: layer.by_size.update({len(v): v.norm().item()}), {}),
    "nested": (lambda layer, v: layer.nested["a"][0].add(float(v.sum())), {"a": ({1.0},)}),
    "meter.count": (lambda layer, v: setattr(layer.meter, "count", layer.meter.count + 1), Meter()),
    "meter.values": (lambda layer, v: layer.meter.values.__iadd__(1), Meter()),
    "inner.calls": (lambda layer, v: setattr(layer.inner, "calls", layer.inner.calls + 1), nn.Identity()),
    "queue": (lambda layer, v: layer.queue.pop(), list(range(1000))),
    "weights": (lambda layer, v: layer.weights.data.mul_(0.5), None),
}


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_what_forward_leaves_behind_is_named(name):
    effect, value = SIDE_EFFECTS[name]

    def forward(self, x):
        v = seed.Capsule.forward(self, x)
        effect(self, v)
        return v

    layer = named_capsule(forward, **({name.partition(".")[0]: value} if value is not None else {}))
    if name == "inner.calls":
        layer.inner.calls = 0
    if name == "poses":
        layer(torch.randn(4, I, D_IN))  # with a history, which deepcopy refuses
    assert f"its forward also sets {name}, which" in refusal(layer)


def test_what_forward_only_reads_is_no_side_effect():
    layer = named_capsule(lambda self, x: seed.Capsule.forward(self, x))
    layer.config, layer.meter, layer.nan, layer.loop = {"a": [1, {2}]}, Meter(), float("nan"), []
    layer.function, layer.kind = len, Meter
    layer.loop.append(layer.loop)
    assert quietly(layer, torch.randn(4, I, D_IN)).replaced == [""]


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_submodules_would_no_longer_be_called(kind):
    layer = LAYERS["adambielski"]()
    handle = getattr(layer.routing_module, f"register_{kind}")(lambda *args: None)
    assert "routing_module has hooks" in refusal(layer)
    handle.remove()
    getattr(layer, f"register_{kind}")(lambda *args: None)  # on the layer itself it stays
    assert quietly(layer, torch.randn(4, I, D_IN)).replaced == [""]


def test_hooks_that_cannot_be_copied():
    layer, lock, calls = LAYERS["capsule"](), threading.Lock(), []

    class Hook:
        def __call__(self, *args):
            with self.lock:
                calls.append(args)

    hook = Hook()
    hook.lock = lock
    layer.register_forward_hook(hook)
    with pytest.raises(TypeError, match="cannot pickle"):
        copy.deepcopy(layer)
    assert quietly(layer, torch.randn(4, I, D_IN)).replaced == [""]
    assert len(calls) == 2


def fixed_batch(self, x):
    return seed.Capsule.forward(self, x + self.logits)


def in_place(self, x):
    return seed.Capsule.forward(self, x.mul_(2))


RETURNS = {
    "logits of a fixed batch size": (fixed_batch, "size of tensor a"),
    "inputs changed in place": (in_place, "changes its input in place"),
    "no coupling": (lambda self, x: (seed.Capsule.forward(self, x), None), "returns tuple of Tensor, NoneType"),
    "a dict": (lambda self, x: {"v": seed.Capsule.forward(self, x)}, "returns dict, and"),
    "a tuple of one": (lambda self, x: (seed.Capsule.forward(self, x),), "returns tuple of Tensor, and"),
    "a tuple of three": (
        lambda self, x: (seed.Capsule.forward(self, x), x, x),
        "output 2: the old layer returns (4, 11, 4), the recipe's none",
    ),
    "no gradient": (
        lambda self, x: seed.Capsule.forward(self, x).detach(),
        "no combination of conventions explains it",
    ),
}


@pytest.mark.parametrize("name", RETURNS)
def test_a_layer_that_cannot_be_compared_is_a_row_of_the_report(name):
    forward, reason = RETURNS[name]
    assert reason in refusal(named_capsule(forward, logits=torch.zeros(4, 1, 1)))


def test_a_class_that_cannot_be_converted_is_a_row_of_the_report():
    class Capsule(seed.Capsule):
        def __init_subclass__(cls, *, needed, **kwargs):
            super().__init_subclass__(**kwargs)

    layer = Capsule(I, D_IN, J, D_OUT, 3)
    assert "__init_subclass__() missing" in refusal(layer)
    assert "_fastcaps_plan" not in vars(layer)


def test_no_cost_that_fails_loses_the_report(monkeypatch):
    def fail(*args):
        raise ValueError("no profiler here")

    monkeypatch.setattr("fastcaps.convert.replace.training_cost", fail)
    row = replace_capsules(LAYERS["capsule"](), torch.randn(4, I, D_IN)).layers[0]
    assert row.replaced
    assert row.before is row.after is None


def test_norm_eps_counts_in_float32_too():
    class Float32Only(xifengguo.DenseCapsule):
        def forward(self, x):
            return super().forward(x) if x.dtype == torch.float32 else 1 / 0

    recipe = dataclasses.replace(BY_NAME["xifengguo"], classes="Float32Only")
    for size, replaced in ((1.0, True), (1e-3, False)):
        layer = Float32Only(I, D_IN, J, D_OUT)
        report = quietly(layer, size * torch.randn(4, I, D_IN), recipes=[recipe])
        assert "compared in float32" in str(report)
        assert (report.replaced == [""]) == replaced, str(report)
        assert ("capsules are so short" in str(report)) != replaced


def test_a_tolerance_allows_what_leaving_norm_eps_out_changes():
    x = 1e-3 * torch.randn(4, I, D_IN)
    recipe = BY_NAME["xifengguo"]
    assert "capsules are so short" in quietly(LAYERS["xifengguo"](), x, recipes=[recipe]).layers[0].reason
    report = quietly(LAYERS["xifengguo"](), x, recipes=[dataclasses.replace(recipe, tolerance=1e-3)])
    assert report.replaced == [""]
    assert 1e-5 < max(report.layers[0].output, report.layers[0].gradient) < 1e-3


@pytest.mark.parametrize("name", WRONG)
def test_fix_reports_how_far_the_outputs_move(name, monkeypatch):
    layer, x = LAYERS[name]().double(), poses_for(name, B=4, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        old = layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    row = quietly(layer, x, fix=True).layers[0]
    moved = (torch.linalg.vector_norm(layer(x) - old) / torch.linalg.vector_norm(old)).item()
    assert row.output >= moved * (1 - 1e-9) > 0.01
    assert row.gradient > 0.01
    assert "from the paper's routing in plain PyTorch they are" in str(row.notes)
    monkeypatch.setattr(
        "fastcaps.convert.converted.dynamic_routing", lambda *a, **k: 1.001 * fastcaps.dynamic_routing(*a, **k)
    )
    layer = LAYERS[name]()
    assert "fastcaps itself is wrong here" in quietly(layer, poses_for(name), fix=True).layers[0].reason
    assert not isinstance(layer, ConvertedCapsules)


def test_lazy_modules_beside_and_instead_of_the_layer():
    class DenseCapsule(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.parameter.UninitializedParameter()

        def forward(self, x):
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.LazyConv1d(I, 1, bias=False), LAYERS["capsule"]()  # its one parameter: weight
            self.lazy = DenseCapsule()

        def forward(self, x):
            return self.layer(self.first(self.lazy(x)))

    report = quietly(Model(), torch.randn(4, 3, D_IN))
    assert report.replaced == ["layer"]
    assert "lazy (DenseCapsule) was not recognised: recipe 'xifengguo'" in str(report)
    assert "weight has no shape yet: call the model once" in str(report)


def test_a_layer_that_is_made_in_the_first_call():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = None

        def forward(self, x):
            if self.layer is None:
                self.layer = LAYERS["abc-capsnet"]()
            return self.layer(x)

    report = quietly(Model(), torch.randn(4, I, D_IN))
    assert report.replaced == ["layer"]
    assert report.similar == ()


def test_an_argument_that_is_equal_to_its_default():
    zero = torch.zeros(2)

    def forward(self, x, scale=1000.0, shape=(1, 2), shift=zero):
        return seed.Capsule.forward(self, x)

    layer, x = named_capsule(forward), torch.randn(4, I, D_IN)
    wanted = layer(x)
    assert quietly(layer, x).replaced == [""]
    equal = {"scale": float("1000"), "shape": tuple(range(1, 3)), "shift": torch.zeros(2)}  # other objects
    torch.testing.assert_close(layer(x, **equal), wanted)
    for other in ({"scale": 999.0}, {"shape": None}, {"shift": torch.ones(2)}, {"shift": torch.zeros(3)}):
        with pytest.raises(TypeError, match="takes x; got x, s"):
            layer(x, **other)


def test_a_model_that_calls_forward_itself():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LAYERS["capsule"]()

        def forward(self, x):
            return self.layer.forward(x)

    assert "or called its forward alone: layer.forward(x)" in str(quietly(Model(), torch.randn(4, I, D_IN)))


def test_the_code_of_a_hint_runs():
    class Renamed(xifengguo.DenseCapsule):
        pass

    model, x = nn.Sequential(Renamed(I, D_IN, J, D_OUT)), torch.randn(4, I, D_IN)
    text = str(quietly(model, x))
    names = {}
    exec(inspect.cleandoc(text.partition("pass recipes=recipes after\n")[2]), names)
    assert len(names["recipes"]) == len(RECIPES) + 1
    assert quietly(model, x, recipes=names["recipes"]).replaced == ["0"]
    mine = dataclasses.replace(BY_NAME["xifengguo"], name="mine", classes="Other")
    text = str(quietly(nn.Sequential(Renamed(I, D_IN, J, D_OUT)), x, recipes=[mine]))
    assert "describes it, but does not know its class: add 'Renamed' to the classes of that recipe" in text


def test_no_hint_routes_less_than_once():
    for T in (1, 2, 3):
        for recipe in RECIPES:
            changes = [variant.offset - recipe.offset for variant in variants(recipe, T)]
            assert T + min(changes) > 0
            assert max(changes) == 2
