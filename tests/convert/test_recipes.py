"""What a recipe can say: votes, several returns, several axes of input capsules, functions, tolerances, arguments."""

import dataclasses
import warnings

import pytest
import torch
from support.layers_to_convert import (
    BY_NAME,
    CALLED_WITH_MORE,
    D_IN,
    D_OUT,
    LAYERS,
    RETURN_TWO,
    I,
    J,
    poses_for,
    quietly,
)
from torch import nn

from fastcaps.convert import RECIPES, ConvertedCapsules, Recipe, replace_capsules


def route(u, T=3, squash=None):
    """Procedure 1 on votes [B, I, J, D_out]; its last v, s and c."""
    b = torch.zeros_like(u[..., 0])
    for t in range(T):
        c = b.softmax(2)
        s = torch.einsum("bij,bijd->bjd", c, u)
        n2 = (s * s).sum(-1, keepdim=True)
        v = s * n2.sqrt() / (1 + n2) if squash is None else squash(s, n2)
        if t < T - 1:
            b = b + torch.einsum("bijd,bjd->bij", u, v)
    return v, s, c


class Layer(nn.Module):
    """Poses [B, I, D_in]; what it returns is the function of the routing's v, s and c that it was given."""

    def __init__(self, returned=lambda v, s, c: v, squash=None):
        super().__init__()
        self.W = nn.Parameter(torch.randn(I, J, D_OUT, D_IN))
        self.returned, self.squash = returned, squash

    def forward(self, x):
        return self.returned(*route(torch.einsum("bik,ijdk->bijd", x, self.W), squash=self.squash))


MINE = Recipe("mine", "Layer", "W", "I J D_out D_in")


def values_and_gradients(layer, x):
    """Everything that a layer returns, and the gradients of a random combination of it, in float64."""
    x = x.double().requires_grad_()
    torch.set_default_dtype(torch.float64)
    try:
        outputs = layer.double()(x)
    finally:
        torch.set_default_dtype(torch.float32)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    grads = [torch.randn(out.shape, dtype=out.dtype) for out in outputs]  # whatever the order in memory
    return [*outputs, *torch.autograd.grad(outputs, [x, *layer.parameters()], grads, allow_unused=True)]


def assert_replaced_and_equal(layer, x, *recipes, **options):
    """The report says that it is replaced, and on other samples than the report's it computes what it did."""
    other = 2 * torch.randn_like(x)
    wanted = [None if t is None else t.detach().clone() for t in values_and_gradients(layer, other)]
    layer.float()
    report = quietly(layer, x, recipes=(*RECIPES, *recipes), **options)
    assert report.replaced == [""], str(report)
    assert isinstance(layer, ConvertedCapsules)
    for a, b in zip(wanted, values_and_gradients(layer, other), strict=True):
        assert (a is None) == (b is None) or not (b if a is None else a).any()
        if a is not None:
            assert torch.linalg.vector_norm(a - b) <= 1e-9 * torch.linalg.vector_norm(a)
    return report.layers[0]


def refused(layer, x, *recipes):
    """Why a layer stays as it was."""
    report = quietly(layer, x, recipes=recipes)
    assert report.replaced == []
    assert not isinstance(layer, ConvertedCapsules)
    return report.layers[0].reason


def poses(B=7):
    return torch.randn(B, I, D_IN)


# --------------------------------------------------------------------------------------------------- what is returned

RETURNED = {
    "v": (lambda v, s, c: v.mT, {"output": "B D_out J"}),
    "s": (lambda v, s, c: s, {"returns": "s"}),
    "length": (lambda v, s, c: v.norm(dim=-1), {"returns": "length", "output": "B J"}),
    "s, c": (lambda v, s, c: (s, c), {"returns": ("s", "c"), "output": ("B J D_out", "B I J")}),
    "c, length, v": (
        lambda v, s, c: (c.mT, v.norm(dim=-1, keepdim=True), v),
        {"returns": ("c", "length", "v"), "output": ("B J I", "B J 1", "B J D_out")},
    ),
    "a function": (
        lambda v, s, c: (v.flatten(1), v.norm(dim=-1).softmax(1)),
        {"returns": ("v", "length"), "output": lambda v, length: (v.flatten(1), length.softmax(1))},
    ),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_layer_may_return(name):
    returned, says = RETURNED[name]
    assert_replaced_and_equal(Layer(returned), poses(), dataclasses.replace(MINE, **says))


def test_another_return_is_refused():
    wrong = dataclasses.replace(MINE, returns="s")
    assert "most likely returns='v' instead of 's'" in refused(Layer(), poses(), wrong)
    wrong = dataclasses.replace(MINE, returns="length", output="B J")
    assert "it differs" in refused(Layer(lambda v, s, c: s.norm(dim=-1)), poses(), wrong)
    assert "the flag output" in refused(Layer(lambda v, s, c: (v, c)), poses(), MINE)


@pytest.mark.parametrize("name", RETURN_TWO)
def test_published_layers_that_return_the_coupling(name):
    row = assert_replaced_and_equal(RETURN_TWO[name](), poses())
    assert row.recipe == name


def test_the_sum_with_conventions_bias_prior_and_constant_coupling():
    class Digits(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.a = nn.Parameter(torch.randn(I, J, D_OUT, D_IN)), nn.Parameter(torch.randn(J, D_OUT))
            self.prior = nn.Parameter(torch.randn(I, J))

        def forward(self, x):
            u = torch.einsum("bik,ijdk->bijd", x, self.W)
            b = self.prior.expand(len(x), -1, -1)
            for _ in range(3):
                c = b.softmax(1)
                s = torch.einsum("bij,bijd->bjd", c, u) + self.a
                n = s.norm(dim=-1, keepdim=True)
                b = b + torch.einsum("bijd,bjd->bij", u, s * n / (1 + n * n))
            return s, c

    recipe = Recipe(
        "mine", "Digits", "W", "I J D_out D_in", prior="prior", bias="a", softmax="inputs",
        returns=("s", "c"), output=("B J D_out", "B I J"),
    )  # fmt: skip
    assert_replaced_and_equal(Digits(), poses(), recipe)
    half = Layer(lambda v, s, c: s)
    quietly(half, poses(), recipes=[dataclasses.replace(MINE, returns="s")])
    x = poses()
    wanted = half(x)
    result = half.bfloat16()(x.bfloat16())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), wanted, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.compiler
def test_what_a_layer_may_return_compiles_without_a_graph_break(name):
    returned, says = RETURNED[name]
    layer, x = Layer(returned), poses()
    assert quietly(layer, x, recipes=[dataclasses.replace(MINE, **says)]).replaced == [""]
    wanted = layer(x)
    result = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(result, wanted)


# ----------------------------------------------------------------------------------------------- votes, axes, functions


class Votes(nn.Module):
    """Votes [B, I, J, D_out], of another module's making; no parameter."""

    def forward(self, u):
        return route(u)[0]


@pytest.mark.parametrize("convention", [{}, {"softmax": "inputs"}, {"logits": "batch"}], ids=str)
def test_votes_without_a_weight(convention):
    class Given(nn.Module):
        def forward(self, u):
            b = torch.zeros_like(u[..., 0])
            for _ in range(3):
                s = torch.einsum("bij,bijd->bjd", b.softmax(1 if "softmax" in convention else 2), u)
                n = s.norm(dim=-1, keepdim=True)
                v = s * n / (1 + n * n)
                gain = torch.einsum("bijd,bjd->bij", u, v)
                b = b + (gain.mean(0, keepdim=True) if "logits" in convention else gain)
            return v

    recipe = Recipe("given", "Given", weight=None, input="B I J D_out", **convention)
    assert_replaced_and_equal(Given(), torch.randn(7, I, J, D_OUT), recipe)
    wrong = dataclasses.replace(recipe, detach=True)
    assert "most likely detach=False" in refused(Given(), torch.randn(7, I, J, D_OUT), wrong)


class TwoAxes(nn.Module):
    """Poses [B, types, places, D_in]; a matrix for each of these, or for each type."""

    def __init__(self, types=3, places=4, shared=False):
        super().__init__()
        self.W = nn.Parameter(torch.randn(1, J, types, 1 if shared else places, D_OUT, D_IN))

    def forward(self, x):
        u = (self.W @ x[:, None, ..., None]).squeeze(-1)  # [B, J, types, places, D_out]
        return route(u.flatten(2, 3).transpose(1, 2))[0]


@pytest.mark.parametrize("shared", [False, True])
def test_input_capsules_on_several_axes(shared):
    recipe = Recipe("two", "TwoAxes", "W", f"1 J I1 {'1' if shared else 'I2'} D_out D_in", input="B I1 I2 D_in")
    assert_replaced_and_equal(TwoAxes(shared=shared), torch.randn(7, 3, 4, D_IN), recipe)
    wrong = dataclasses.replace(recipe, input="B I2 I1 D_in")
    assert "does not fit" in refused(TwoAxes(), torch.randn(7, 3, 4, D_IN), wrong)


@pytest.mark.compiler
def test_input_capsules_on_several_axes_compile_without_a_graph_break():
    layer, x = TwoAxes(shared=True), torch.randn(7, 3, 4, D_IN)
    recipe = Recipe("two", "TwoAxes", "W", "1 J I1 1 D_out D_in", input="B I1 I2 D_in")
    assert quietly(layer, x, recipes=[recipe]).replaced == [""]
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


class Factors(nn.Module):
    """The weight is a product of two parameters, the poses come as a feature map, and a gain is not used."""

    def __init__(self):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(I, J, D_OUT, 2)), nn.Parameter(torch.randn(I, J, 2, D_IN))
        self.gain = nn.Linear(2, 2)

    def forward(self, x):
        u = torch.einsum("bik,ijdr,ijrk->bijd", x.flatten(2).mT, self.A, self.B)
        return route(u, 2)[0].mT


def weight_of(layer):
    return layer.A @ layer.B


def poses_of(x):
    return x.flatten(2).mT


def test_functions_for_weight_input_and_output():
    recipe = Recipe(
        "mine", "Factors", weight=weight_of, num_iterations=2, unused="gain", input=poses_of, output=lambda v: v.mT
    )
    x = torch.randn(7, D_IN, I, 1)
    assert_replaced_and_equal(Factors(), x, recipe)
    assert_replaced_and_equal(Factors(), x, dataclasses.replace(recipe, num_iterations=lambda layer: layer.A.dim() - 2))
    assert "differs" in refused(Factors(), x, dataclasses.replace(recipe, num_iterations=3))
    assert "differs" in refused(Factors(), x, dataclasses.replace(recipe, eps=1e-12))
    assert "differs" in refused(
        Factors(), x, dataclasses.replace(recipe, weight=lambda layer: (layer.A @ layer.B).detach())
    )
    assert "most likely the flag output" in refused(Factors(), x, dataclasses.replace(recipe, output="B J D_out"))


# ------------------------------------------------------------------------------- tolerances, arguments, parameters


def test_a_tolerance_that_the_user_gives():
    def squash(s, n2):
        return s * n2.sqrt() / (1 + n2 + 1e-7)

    x = poses()
    assert "it differs" in refused(Layer(squash=squash), x, MINE)
    report = quietly(Layer(squash=squash), x, recipes=[dataclasses.replace(MINE, tolerance=1e-6)])
    assert report.replaced == [""]
    assert 1e-9 < report.layers[0].output < 1e-6
    assert "its recipe allows differences of 1e-06" in str(report)
    for wrong in ({"detach": True}, {"num_iterations": 2}, {"softmax": "inputs"}, {"squash": "outputs"}):
        layer = Layer(squash=squash)
        assert "it differs" in refused(layer, x, dataclasses.replace(MINE, tolerance=1e-3, **wrong))
    with pytest.raises(ValueError, match=r"tolerance must be at most 0.001, got 0.1"):
        dataclasses.replace(MINE, tolerance=0.1)


def test_extra_arguments_are_ignored_by_name_and_devices_without():
    class Caps(Layer):
        def forward(self, x, device, verbose, scale=1.0):
            return super().forward(x.to(device)) * scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.caps = Caps()

        def forward(self, x, scale=1.0):
            return self.caps(x, x.device, "some", scale=scale)

    recipe = dataclasses.replace(MINE, classes="Caps")
    assert "takes x; got x, device, verbose" in refused(Model(), poses(), recipe)
    named = dataclasses.replace(recipe, ignored_arguments=("verbose",))
    model, x = Model(), poses()
    wanted = model(x)
    assert quietly(model, x, recipes=[named]).replaced == ["caps"]
    torch.testing.assert_close(model(x), wanted)
    with pytest.raises(TypeError, match="takes x, verbose; got x, device, verbose, scale"):
        model(x, scale=2.0)
    # what is named is ignored whatever it is; that it changes nothing is said by the recipe, and compared on the sample
    report = quietly(Model(), (x, 2.0), recipes=[dataclasses.replace(named, ignored_arguments=("verbose", "scale"))])
    assert "it differs" in report.layers[0].reason


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["name", "device"])
def test_a_published_layer_with_an_argument_for_the_device(device):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.digits = CALLED_WITH_MORE["capsfake"]()

        def forward(self, x):
            return self.digits(x, device)

    model, x = Model(), poses()
    wanted = model(x)
    with pytest.warns(UserWarning, match="bends each entry"):
        report = replace_capsules(model, x, measure=False)
    assert report.replaced == ["digits"]
    assert report.layers[0].recipe == "capsfake"
    torch.testing.assert_close(model(x), wanted)


def test_unused_parameters_are_named_or_refused():
    class Layer2(Layer):
        def __init__(self, used):
            super().__init__()
            self.norm, self.gain, self.used = nn.LayerNorm(D_IN), nn.Parameter(torch.ones(1)), used

        def forward(self, x):
            return super().forward(x) * (self.gain if self.used else 1)

    recipe = dataclasses.replace(MINE, classes="Layer2")
    assert "its parameters are W, gain, norm.weight, norm.bias, not W" in str(
        quietly(Layer2(False), poses(), recipes=[recipe])
    )
    named = dataclasses.replace(recipe, unused=("norm", "gain"))
    assert_replaced_and_equal(Layer2(False), poses(), named)
    assert "it differs" in refused(Layer2(True), poses(), named)


# ------------------------------------------------------------------------------------------------- bad recipes, reports


@pytest.mark.parametrize(
    ("says", "match"),
    [
        ({"weight": None}, "weight=None needs no axes"),
        ({"axes": None}, "needs axes of the weight"),
        ({"weight": None, "axes": None}, "made of B, I, J, D_out, 1"),
        ({"returns": "u"}, "returns must be of 'v', 's', 'c', 'length'"),
        ({"returns": ("v", "c")}, "output must have axes for each of v, c"),
        ({"returns": "length"}, "must name B and J|made of B, J"),
        ({"input": "B I1 I1 D_in"}, "each once"),
    ],
    ids=str,
)
def test_recipes_that_say_too_little_or_too_much(says, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(MINE, **says)


def test_the_error_in_float32_before_and_after_stands_in_the_report():
    class Rough(Layer):
        def forward(self, x):  # a sum over the input capsules in an order that loses digits
            out = super().forward(x)
            big = 1e4 if x.dtype == torch.float32 else 0.0
            return out + big - big

    row = quietly(Rough(), poses(), recipes=[dataclasses.replace(MINE, classes="Rough")]).layers[0]
    before, after = row.float32
    assert before > 1e-5
    assert after < 1e-5
    assert f"{before:.0e}, {after:.0e}" in " ".join(row.cells())
    assert row.output < 1e-9
    assert "float32 before, after" in str(quietly(Layer(), poses(), recipes=[MINE]))


def test_fix_mends_what_a_recipe_is_wrong_in_only_there():
    """timomernick's squash over the output capsules, with a recipe that does not know of it."""
    recipe = dataclasses.replace(BY_NAME["timomernick"], squash="norm")
    x = poses_for("timomernick")
    assert "most likely squash='outputs' instead of 'norm'" in refused(LAYERS["timomernick"](), x, recipe)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = replace_capsules(LAYERS["timomernick"](), x, recipes=[recipe], fix=True, measure=False)
    assert report.replaced == [""]
    assert "its recipe is wrong in what was mended: squash='outputs' instead of 'norm'" in str(report)
    assert any("norm over the output capsules" in str(one.message) for one in caught)
    wrong = dataclasses.replace(recipe, detach=True)
    report = quietly(LAYERS["timomernick"](), x, recipes=[wrong], fix=True)
    assert report.replaced == []
