"""Copies and pickles of converted layers and of recipes, those of version 0.1 included."""

import copy
import dataclasses
import importlib
import io
import pickle
import threading
import warnings
from pathlib import Path

import pytest
import torch
from peers import readable_capsnet, seed
from support.layers_to_convert import BY_NAME, D_IN, D_OUT, LAYERS, I, J, quietly
from torch import nn

from fastcaps.convert import ConvertedCapsules, Recipe


def test_copies_pickles_and_averaged_models(tmp_path):
    layer, x = LAYERS["capsule"](), torch.randn(3, I, D_IN)
    model = nn.Sequential(layer)
    quietly(model, x)
    for other in (copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)):
        torch.testing.assert_close(other(x), model(x))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded[0], ConvertedCapsules)
    torch.testing.assert_close(loaded(x), model(x))


class Secretive(seed.Capsule):
    def __init__(self):
        super().__init__(I, D_IN, J, D_OUT, 3)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("lock", "_fastcaps_plan")}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_pickles_hold_what_the_old_class_says():
    layer, x = Secretive(), torch.randn(4, I, D_IN)
    recipe = dataclasses.replace(BY_NAME["capsule"], classes="Secretive")
    assert quietly(layer, x, recipes=[recipe]).replaced == [""]
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert isinstance(other, ConvertedCapsules)
        assert other.lock is not layer.lock
        assert torch.equal(other(x), layer(x))


def test_a_converted_layer_that_was_pickled_with_0_1():
    """``readable_capsnet.CapsuleLayerCalled(2, 3, 2, 2)`` with the weight 0.1 n - 1, pickled by commit 4ab04b2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it names the old module paths
        layer = pickle.loads((Path(__file__).parent / "converted_by_0.1.pkl").read_bytes())
    assert isinstance(layer, ConvertedCapsules)
    assert isinstance(layer, readable_capsnet.CapsuleLayerCalled)
    poses = torch.arange(12.0).reshape(2, 2, 3) / 5 - 1
    wanted = torch.tensor([
        [[0.4701680541038513, 0.37822917103767395], [0.048384279012680054, 0.02313864603638649]],
        [[0.06480792164802551, 0.10663830488920212], [0.5754789113998413, 0.66977459192276]],
    ])  # fmt: skip
    torch.testing.assert_close(layer(poses, 2), wanted)  # what 0.1 computed
    again = pickle.loads(pickle.dumps(layer))
    assert again._fastcaps_plan == layer._fastcaps_plan
    assert torch.equal(again(poses, 2), layer(poses, 2))


OLD = {"layout": "J I D_in D_out", "iterations": "routings", "prior_layout": "J I", "bias_layout": "D_out J"}
NEW = dict(zip(("axes", "num_iterations", "prior_axes", "bias_axes"), OLD.values(), strict=True))


def test_a_recipe_takes_the_names_of_0_1():
    recipe = Recipe("mine", "Mine", "W", **NEW)
    with pytest.warns(DeprecationWarning, match="is now") as told:
        assert Recipe("mine", "Mine", "W", **OLD) == recipe
    assert all(
        any(f"{old}= is now {new}=" in str(one.message) for one in told) for old, new in zip(OLD, NEW, strict=True)
    )
    for (old, value), new in zip(OLD.items(), NEW, strict=True):
        with pytest.warns(DeprecationWarning, match=f"{old} is now Recipe.{new}"):
            assert getattr(recipe, old) == value
    with pytest.warns(DeprecationWarning, match="iterations= is now num_iterations="):
        assert dataclasses.replace(recipe, iterations=2).num_iterations == 2
    with pytest.raises(AttributeError, match="no attribute 'layers'"):
        recipe.layers  # noqa: B018


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "layouts": ["Layout"],
        "recipes": ["EPSILONS", "Plan", "RECIPES", "Recipe", "get_path", "set_path", "variants"],
        "verification": ["LIMIT", "Verdict", "detached_copy", "verify"],
        "contents": ["contents", "differences", "held"],
    }.items(),
)
def test_names_at_their_places_of_0_1(module, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # given by the first import only
        old = importlib.import_module(f"fastcaps.{module}")
    assert all(hasattr(old, name) for name in names)
