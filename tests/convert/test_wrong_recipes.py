"""Every wrong recipe is refused, and the flag that is wrong is named."""

import dataclasses

import pytest
import torch
from peers import seed
from support.layers_to_convert import BY_NAME, CONSTANT_T, LAYERS, J, poses_for, quietly

from fastcaps.convert import Recipe
from fastcaps.routing.conventions import CHOICES

pytestmark = pytest.mark.exhaustive


def flips(recipe, T):
    """Every field with another value; some have several."""
    J_in_one_axis = recipe.out_capsules is not None
    swapped = {
        "axes": ["J I D_in D_out" if recipe.axes != "J I D_in D_out" else "I J D_in D_out"],
        "input": ["I B D_in", "B I D_in" if recipe.input == "B D_in I" else "B D_in I"],
        "output": ["B D_out J", "B J D_out 1 1"],
        "prior_axes": ["J I"],
        "bias_axes": ["D_out J"],
    }
    if recipe.axes.startswith("1 "):
        swapped["axes"] = [
            "1 J I D_in D_out",
            "1 I J D_in D_out" if "D_out D_in" in recipe.axes else "1 I J D_out D_in",
        ]
    if J_in_one_axis:
        swapped["axes"] = ["I D_in (D_out J)", "D_in I (J D_out)"]
    values = {
        "classes": ["SomethingElse"],
        "weight": ["missing"],
        "num_iterations": [n - recipe.offset for n in (T + 1, T - 1) if n > 0],
        "offset": [recipe.offset + 1, *([recipe.offset - 1] if T > 1 else [])],
        "out_capsules": [J + 1] if J_in_one_axis else [],
        "prior": [None] if recipe.prior else ["missing"],
        "bias": [None] if recipe.bias else ["missing"],
        "softmax": [{"outputs": "inputs", "inputs": "outputs"}[recipe.softmax]],
        "logits": [{"sample": "batch", "batch": "sample"}[recipe.logits]],
        "squash": [other for other in CHOICES["squash"] if other != recipe.squash],
        "leaky": [True],
        "detach": [not recipe.detach],
        "eps": [0.0 if recipe.eps else 1e-8, 1e-12],
        "norm_eps": [0.0 if recipe.norm_eps else 1e-8],
        "returns": ["s"],
        "ignored_arguments": [],
        "unused": [],
        "tolerance": [],
        **swapped,
    }
    if recipe.prior is None:
        values["prior_axes"] = []  # nothing to arrange
    if recipe.bias is None:
        values["bias_axes"] = []
    assert values.keys() == {f.name for f in dataclasses.fields(Recipe)} - {"name"}
    return [(name, value) for name, options in values.items() for value in options]


EACH_CONVENTION = (*list(LAYERS)[:9], "timomernick")  # the others combine what these have
ALL = [pytest.param(name, marks=() if name in EACH_CONVENTION else pytest.mark.slow) for name in LAYERS]
NAMED = {"softmax", "logits", "squash", "detach", "leaky", "offset", "eps", "norm_eps", "returns"}


@pytest.mark.parametrize("T", [3, 1])
@pytest.mark.parametrize("name", ALL)
def test_each_flag_flipped_is_refused_and_named(name, T):
    recipe = BY_NAME[name]
    if T == 1 and name in CONSTANT_T:
        pytest.skip("its three iterations are written into it")
    for flag, value in flips(recipe, T):
        layer = LAYERS[name](T)
        if flag in ("eps", "norm_eps") and (recipe.norm_eps if flag == "eps" else recipe.eps) and value:
            with pytest.raises(ValueError, match="eps and norm_eps exclude each other"):
                dataclasses.replace(recipe, **{flag: value})
            continue
        wrong = dataclasses.replace(recipe, **{flag: value})
        report = quietly(layer, poses_for(name), recipes=[wrong])
        assert report.replaced == [], f"{flag}={value}: {report}"
        assert type(layer) is type(LAYERS[name](T))
        text = str(report)
        if not report.layers:
            assert "no capsule layer was recognised" in text
            assert "was not recognised" in text
        elif flag in NAMED:
            named = f"most likely {flag}={'' if flag == 'leaky' else repr(getattr(recipe, flag))}"
            assert named in text, f"{flag}={value}: {text}"
        elif flag == "num_iterations":
            assert "most likely offset=" in text, text


@pytest.mark.parametrize("flag", ["axes", "output", "input"])
def test_wrong_axes_are_named(flag):
    wrong = {"axes": "1 J I D_out D_in", "output": "B J D_out 1", "input": "B D_in I"}[flag]
    report = quietly(
        seed.Capsule(6, 6, 6, 6, 3),
        torch.randn(7, 6, 6),
        recipes=[dataclasses.replace(BY_NAME["capsule"], **{flag: wrong})],
    )
    assert report.replaced == []
    assert flag in report.layers[0].reason
