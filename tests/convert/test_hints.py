"""What the report says of layers that no recipe is known for: from trying recipes and conventions, not from names."""

import dataclasses
import inspect
import re

import pytest
import torch
from peers import adambielski, caps_fake, gram_ai, labml, seed, timomernick
from support.layers_to_convert import D_IN, D_OUT, I, J, quietly
from torch import nn

import fastcaps
from fastcaps.convert import RECIPES, Recipe
from fastcaps.convert.guess import arrangements
from fastcaps.convert.recipes import find_recipe


class Unknown(nn.Module):
    """[B, D_in, I] -> [B, D_out, J]; a softmax over the inputs, shared logits, a detached loop, an epsilon."""

    def __init__(self):
        super().__init__()
        self.matrices, self.rounds, self.width = (
            nn.Parameter(torch.randn(J, I, D_OUT * D_IN).view(J, I, D_OUT, D_IN)),
            2,
            2,
        )
        self.extra = nn.Parameter(torch.ones(3))

    def forward(self, x):
        u = torch.einsum("jidk,bki->bijd", self.matrices, x)
        b = torch.zeros(I, J)
        for t in range(self.rounds + 1):
            votes = u if t == self.rounds else u.detach()
            s = torch.einsum("ij,bijd->bjd", b.softmax(0), votes)
            n2 = (s * s).sum(-1, keepdim=True)
            v = s * n2 / (1 + n2) / (n2 + 1e-7).sqrt()
            b = b + torch.einsum("bijd,bjd->ij", u.detach(), v.detach()) / len(x)
        return v.mT


def recipes_of(text):
    """What the code of a hint makes."""
    names = {}
    exec(inspect.cleandoc(text.partition("pass recipes=recipes after\n")[2]), names)
    return names["recipes"]


def test_a_combination_of_conventions_is_found_by_trying():
    model, x = nn.Sequential(Unknown()), torch.randn(4, D_IN, I)
    report = quietly(model, x)
    assert report.replaced == []
    (hint,) = report.similar
    assert "0 (Unknown) was not recognised, but a recipe describes it" in hint
    *_, found = recipes_of(hint)
    says = {"axes": "J I D_out D_in", "num_iterations": "rounds", "offset": 1, "softmax": "inputs", "logits": "batch"}
    says |= {"detach": True, "eps": 1e-7, "input": "B D_in I", "output": "B D_out J", "unused": ("extra",)}
    assert found == Recipe("mine", "Unknown", "matrices", **says)
    assert quietly(model, x, recipes=recipes_of(hint)).replaced == ["0"]


def test_a_known_layer_under_another_name():
    class Mine(timomernick.CapsuleLayer):
        pass

    model, x = nn.Sequential(Mine(D_IN, I, J, D_OUT)), torch.randn(4, D_IN, I)
    (hint,) = quietly(model, x).similar
    assert "0 (Mine) was not recognised: recipe 'timomernick' describes it, but does not know its class" in hint
    assert quietly(model, x, recipes=recipes_of(hint)).replaced == ["0"]


class Votes(nn.Module):
    """``[B, J, I, D_out]`` -> ``[B, J, D_out]``."""

    def forward(self, votes):
        logits = votes.new_zeros(votes.shape[:3])
        for _ in range(3):
            v = fastcaps.squash(torch.einsum("bji,bjid->bjd", logits.softmax(1), votes))
            logits = logits + torch.einsum("bjd,bjid->bji", v, votes)
        return v


def test_a_layer_that_is_given_the_votes():
    model, votes = nn.Sequential(Votes()), torch.randn(4, J, I, D_OUT)
    (hint,) = quietly(model, votes).similar
    *_, found = recipes_of(hint)
    assert found == Recipe("mine", "Votes", None, input="B J I D_out")
    assert quietly(model, votes, recipes=recipes_of(hint)).replaced == ["0"]


def test_of_votes_and_the_layer_around_that_makes_them_the_layer_is_described():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.route = nn.Parameter(torch.randn(J, I, D_OUT, D_IN)), Votes()

        def forward(self, x):
            return self.route(torch.einsum("jidk,bik->bjid", self.weight, x))

    (hint,) = quietly(Whole(), torch.randn(4, I, D_IN)).similar
    *_, found = recipes_of(hint)
    assert found == Recipe("mine", "Whole", "weight", "J I D_out D_in")


def test_the_lines_to_complete_for_a_module_without_parameters():
    class Weighted(nn.Module):
        def forward(self, votes):
            return (votes.sum(3, keepdim=True).softmax(1) * votes).sum(1)

    report = quietly(Weighted(), torch.randn(4, I, J, D_OUT))
    (hint,) = report.similar
    assert "a softmax is taken in the model (Weighted)" in hint
    assert "Recipe('mine', 'Weighted', weight=None, input='B I J D_out')" in hint
    names = {}
    exec(inspect.cleandoc(hint.partition("pass recipes=recipes:\n")[2]), names)
    assert names["recipes"][-1].weight is None


def test_names_alone_are_no_hint():
    """The parameters of gram-ai's layer, and another computation."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.route_weights, self.num_iterations = nn.Parameter(torch.randn(J, I, D_IN, D_OUT)), 3

        def forward(self, x):
            u = torch.einsum("jikd,bik->bjid", self.route_weights, x)
            return torch.einsum("bji,bjid->bjd", u.sum(-1).softmax(2), u)

    report = quietly(Attention(), torch.randn(4, I, D_IN))
    assert not any("gram-ai" in text for text in report.similar)
    assert "a softmax is taken in the model (Attention)" in str(report)
    lines = str(report).splitlines()[-2:]
    assert [line.strip()[:26] for line in lines] == ["from fastcaps.convert impo", "recipes = (*RECIPES, Recip"]
    assert "Recipe('mine', 'Attention', weight='route_weights', axes='I J D_out D_in')" in lines[1]
    names = {}
    exec(inspect.cleandoc("\n".join(lines)), names)  # a recipe that can be made, and is to be corrected
    assert len(names["recipes"]) == len(RECIPES) + 1
    model = Attention()
    model.spare = nn.LazyLinear(3)  # a weight without a shape is none of the largest
    assert "weight='route_weights'" in str(quietly(model, torch.randn(4, I, D_IN)))


def test_the_layer_around_a_module_that_routes_is_found():
    class Renamed(adambielski.CapsLayer):
        pass

    model = nn.Sequential(Renamed(I, D_IN, J, D_OUT, adambielski.AgreementRouting(I, J, 2)))
    (hint,) = quietly(model, torch.randn(4, I, D_IN)).similar
    assert "0 (Renamed) was not recognised: recipe 'adambielski' describes it" in hint


def test_no_hint_for_a_softmax_over_classes_beside_a_known_layer():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.capsules = labml.Router(I, J, D_IN, D_OUT, 3)
            self.attention = nn.MultiheadAttention(D_IN, 2, batch_first=True)

        def forward(self, x):
            x = x + self.attention(x, x, x)[0]
            return self.capsules(x).norm(dim=-1).softmax(1)

    report = quietly(Network(), torch.randn(4, I, D_IN))
    assert report.replaced == ["capsules"]
    assert report.similar == ()


class ByHand(nn.Module):
    def forward(self, logits):
        exponentials = logits.exp()
        return exponentials / exponentials.sum(1, keepdim=True)


class ByItsLogarithm(nn.Module):
    def forward(self, logits):
        return (logits - logits.logsumexp(1, keepdim=True)).exp()


@pytest.mark.parametrize("softmax", [ByHand, ByItsLogarithm])
def test_a_softmax_that_is_written_by_hand_is_one(softmax):
    class Mine(labml.Router):
        pass

    model = nn.Sequential(Mine(I, J, D_IN, D_OUT, 3))
    model[0].softmax = softmax()
    report = quietly(model, torch.randn(4, I, D_IN))
    assert "0 (Mine) was not recognised: recipe 'labml' describes it" in str(report)


def test_several_modules_with_a_softmax_are_named_once():
    class Head(nn.Module):
        def forward(self, x):
            return x.softmax(-1)

    text = str(quietly(nn.Sequential(*[Head() for _ in range(7)]), torch.randn(4, 3)))
    assert re.search(r"a softmax is taken in 0 \(Head\), 1 \(Head\), .*, 4 \(Head\) and 2 more\. If one of these", text)
    assert len(text) < 800


def test_a_model_that_does_not_run_under_a_watch_runs_without():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = gram_ai.CapsuleLayer(J, I, D_IN, D_OUT)

        def forward(self, x):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("no modes, please")
            return self.layer(x)

    assert quietly(Picky(), torch.randn(4, I, D_IN)).replaced == ["layer"]


def test_a_layer_with_a_required_argument_is_described_with_it():
    class Mine(caps_fake.DigitCaps):
        def forward(self, x, where):
            return super().forward(x, where)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.caps = Mine(J, I, D_IN, D_OUT)

        def forward(self, x):
            return self.caps(x, "cpu")

    model, x = Model(), torch.randn(4, I, D_IN)
    (hint,) = quietly(model, x).similar
    assert "ignored_arguments=('where',)" in hint
    assert quietly(model, x, recipes=recipes_of(hint)).replaced == ["caps"]


class Tempered(seed.Capsule):
    """What the second argument is, shows at the value of the sample alone: there it changes nothing."""

    def forward(self, x, other):
        return super().forward(x) * self.factor(other)


FACTORS = {
    "number": (1.0, lambda other: other),
    "power": (2, lambda other: 1.0 if other > 1 else 0.5),
    "flag": (False, lambda other: 1 + int(other)),
    "mask": (torch.ones(4), lambda other: other.view(-1, 1, 1)),
    "chosen": (torch.tensor([0, 1, 2, 0]), lambda other: 1.0 if other[1] else 0.5),
    "pair": ((1.0, 2.0), lambda other: other[0]),
    "string": ("soft", lambda other: 1.0),
    "nothing": (None, lambda other: 1.0 if other is None else 0.5),
}


def second(kind, name="Tempered"):
    """A model whose layer takes another argument, its layer's class, and that argument."""
    value, factor = FACTORS[kind]
    layer = type(name, (Tempered,), {"factor": staticmethod(factor)})(I, D_IN, J, D_OUT, 3)
    return layer, torch.randn(4, I, D_IN), value


@pytest.mark.parametrize("kind", FACTORS)
def test_an_argument_that_may_matter_is_in_no_suggestion(kind):
    layer, x, value = second(kind)
    assert "ignored_arguments" not in str(quietly(layer, (x, value)))


@pytest.mark.parametrize("kind", sorted(FACTORS.keys() - {"string", "nothing"}))
def test_an_argument_that_a_recipe_ignores_and_that_matters_is_named(kind):
    layer, x, value = second(kind)
    mine = dataclasses.replace(find_recipe("capsule"), classes="Tempered", ignored_arguments="other")
    report = quietly(layer, (x, value), recipes=[mine])
    assert report.replaced == []
    assert "its recipe ignores the argument other, but another value changes" in report.layers[0].reason


class Indifferent(seed.Capsule):
    def forward(self, x, count, scale=1.0, mask=None):
        return super().forward(x) + 0 * scale * (1, 1, 1, 1, 1)[count]


@pytest.mark.parametrize("rest", [(4,), (4, 2.0), (4, 1.0, torch.ones(4, I))])
def test_arguments_that_change_nothing_are_in_the_suggestion(rest):
    """Values that do not run are no difference; defaults need no name."""
    layer, x = Indifferent(I, D_IN, J, D_OUT, 3), torch.randn(4, I, D_IN)
    (hint,) = [text for text in quietly(layer, (x, *rest)).similar if "a recipe describes it" in text] or [""]
    *_, found = recipes_of(hint)
    assert found.ignored_arguments == {1: ("count",), 2: ("count", "scale"), 3: ("count", "mask")}[len(rest)]
    assert quietly(layer, (x, *rest), recipes=recipes_of(hint)).replaced == [""]


@pytest.mark.parametrize("argument", ["detach", "scale"])
def test_an_ignored_argument_at_its_default(argument):
    """It need not be given to be tried; and a gradient counts as an output does."""

    class Mine(seed.Capsule):
        def forward(self, x, detach=False, scale=1.0):
            return super().forward(x.detach() if detach else x) * scale

    mine = dataclasses.replace(find_recipe("capsule"), classes="Mine", ignored_arguments=argument)
    report = quietly(Mine(I, D_IN, J, D_OUT, 3), torch.randn(4, I, D_IN), recipes=[mine])
    assert f"its recipe ignores the argument {argument}, but" in report.layers[0].reason


@pytest.mark.parametrize(
    ("shape", "axes", "known", "texts"),
    [
        ((5, 6, 4), ("B", "I", "D_in"), {"B": 5, "D_in": 4}, ["B I D_in"]),
        ((1, 6, 5, 3, 4), ("I", "J", "D_out", "D_in"), {"I": 6, "J": 5, "D_in": 4, "D_out": 3}, ["1 I J D_out D_in"]),
        (
            (6, 4, 15),
            ("I", "J", "D_out", "D_in"),
            {"I": 6, "J": 5, "D_in": 4, "D_out": 3},
            ["I D_in (J D_out)", "I D_in (D_out J)"],
        ),
        ((3, 3), ("J", "D_out"), {}, ["J D_out", "D_out J"]),
        ((2, 2), ("J",), {}, []),
    ],
    ids=str,
)  # fmt: skip
def test_arrangements(shape, axes, known, texts):
    assert [text for text, _ in arrangements(shape, axes, known)] == texts
