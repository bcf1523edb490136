"""Every published layer is recognised, replaced and equal; wrong conventions are kept in bounded memory, or fixed."""

import copy
import warnings

import pytest
import torch
from peers import cedrickchee, gram_ai, higgsfield, readable_capsnet
from support.layers_to_convert import (
    BY_NAME,
    CONSTANT_T,
    D_IN,
    D_OUT,
    LAYERS,
    WRONG,
    I,
    J,
    gradients,
    poses_for,
    quietly,
)
from torch import nn

import fastcaps
from fastcaps.convert import ConvertedCapsules, replace_capsules
from fastcaps.convert.comparison import LIMIT
from fastcaps.convert.converted import Plan
from fastcaps.routing.conventions import Convention, plain_routing

CASES = [(name, T) for name in LAYERS for T in (1, 2, 5) if name not in CONSTANT_T]  # and 3, in the test after it


@pytest.mark.parametrize(("name", "T"), CASES)
def test_every_published_layer_is_replaced_and_equal(name, T):
    layer = LAYERS[name](T)
    old = copy.deepcopy(layer)
    assert_replaced_and_equal(quietly(layer, poses_for(name)), name, old, layer)


def assert_replaced_and_equal(report, name, old, layer):
    """Twice: by the report, and here once more, on poses and weights that the verification has not seen."""
    (row,) = report.layers
    assert row.replaced, str(report)
    assert isinstance(layer, ConvertedCapsules)
    assert isinstance(layer, type(old))
    assert row.recipe == name
    norm_eps = BY_NAME[name].norm_eps
    allowed = 1e-5 if norm_eps else LIMIT
    assert row.output < allowed
    x = poses_for(name, B=3, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)  # two of the layers make their logits by torch.zeros
    try:
        for scale in (1.0, 30.0):
            old, new = (copy.deepcopy(module).double() for module in (old, layer))
            for module in (old, new):
                for n, p in module.named_parameters():
                    p.data.mul_(scale if n != "biases" else 1)
            if norm_eps and scale == 1.0:
                continue  # capsules of length 0.01 or so: the report says by how much it differs
            for a, b in zip(gradients(old, x), gradients(new, x), strict=True):
                assert a.shape == b.shape
                assert torch.linalg.vector_norm(a - b) <= allowed * torch.linalg.vector_norm(a)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_names_and_axes_stay(name):
    layer = LAYERS[name]()
    old, model = copy.deepcopy(layer), nn.Sequential(layer)
    parameters, state = dict(layer.named_parameters()), {k: v.clone() for k, v in layer.state_dict().items()}
    calls = []
    hook = layer.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    layer.eval()
    report = quietly(model, poses_for(name))
    assert report.replaced == ["0"]
    assert model[0] is layer
    assert len(calls) == 2  # hooks see two runs of the model, and nothing of the verification
    assert all(p is parameters[n] for n, p in layer.named_parameters())
    assert {k: v.tolist() for k, v in layer.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    assert not layer.training
    assert all(p.grad is None for p in layer.parameters())
    layer(poses_for(name)).sum().backward()
    assert all(p.grad.shape == p.shape for p in layer.parameters())
    hook.remove()
    assert len(calls) == 3
    assert layer.load_state_dict(state) == nn.modules.module._IncompatibleKeys([], [])
    restored = LAYERS[name]()
    restored.load_state_dict(layer.state_dict())  # and back into the old class
    layer.zero_grad()
    assert_replaced_and_equal(report, name, old, layer)


def test_calls_with_the_number_of_iterations():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = readable_capsnet.CapsuleLayerCalled(I, D_IN, J, D_OUT)

        def forward(self, x, T):
            return self.layer(x, T) + self.layer(x, routing_iterations=T)

    model, x = Model(), torch.randn(3, I, D_IN)
    wanted = [model(x, T) for T in (1, 2, 4)]
    assert quietly(model, (x, 3)).replaced == ["layer"]
    for T, value in zip((1, 2, 4), wanted, strict=True):
        torch.testing.assert_close(model(x, T), value)
    with pytest.raises(TypeError, match="takes poses, routing_iterations; got poses, nothing"):
        model.layer(x, nothing=3)


def test_an_attribute_with_the_iterations_is_read_in_every_call():
    layer, x = LAYERS["capsule"](), torch.randn(3, I, D_IN)
    layer.weights.data.mul_(100)
    quietly(nn.Sequential(layer), x)
    layer.num_routing = 1
    changed = layer(x)
    again = LAYERS["capsule"](1)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(changed, again(x))


def test_earlier_form_with_learned_logits():
    class CapsuleLayer(gram_ai.CapsuleLayer):
        def __init__(self):
            super().__init__(J, I, D_IN, D_OUT)
            self.route_logits = nn.Parameter(torch.zeros(J, 1, I, 1, 1))

        def forward(self, x):
            votes = x[None, :, :, None, :] @ self.route_weights[:, None]
            logits = self.route_logits
            for n in range(self.num_iterations):
                v = self.squash((logits.softmax(2) * votes).sum(2, keepdim=True))
                if n < self.num_iterations - 1:
                    logits = logits + (votes * v).sum(-1, keepdim=True)
            return v

    report = quietly(CapsuleLayer(), torch.randn(4, I, D_IN))
    assert report.replaced == [""]
    assert report.layers[0].recipe == "gram-ai-prior"


# ------------------------------------------------------------------------------- wrong conventions, with memory bounded


@pytest.mark.parametrize("name", WRONG)
def test_wrong_conventions_are_kept_with_a_warning_or_fixed(name):
    x = poses_for(name)
    with pytest.warns(UserWarning, match=WRONG[name]):
        report = replace_capsules(nn.Sequential(LAYERS[name]()), x, measure=False)
    assert WRONG[name] in report.layers[0].warning
    assert f"0: {report.layers[0].warning}" in str(report).splitlines()
    layer = LAYERS[name]()
    with pytest.warns(UserWarning, match="measure the accuracy again"):
        replace_capsules(nn.Sequential(layer), x, fix=True, measure=False)
    recipe = BY_NAME[name]
    batch_axis = recipe.output.split().index("B")
    alone = torch.cat([layer(x[b : b + 1]) for b in range(len(x))], batch_axis)
    torch.testing.assert_close(layer(x), alone)  # no sample sees its batch mates
    plan = Plan.of(recipe, layer)
    tensors = plan.tensors(layer, x)
    options = {"num_iterations": 3, "detach": recipe.detach, "eps": recipe.eps}
    wanted = fastcaps.dynamic_routing(tensors["poses"], tensors["weight"], **options)
    torch.testing.assert_close(plan.axes["v"].canonical(layer(x), {}), wanted)
    assert recipe.convention.effects


@pytest.mark.parametrize("logits", ["sample", "batch"])
@pytest.mark.parametrize("softmax", ["outputs", "inputs"])
@pytest.mark.parametrize("squash", ["norm", "elementwise", "outputs"])
@pytest.mark.parametrize("detach", [False, True])
def test_conventions_in_bounded_memory_equal_votes_in_memory(softmax, logits, squash, detach, monkeypatch):
    monkeypatch.setattr("fastcaps.routing.conventions.VOTES_AT_ONCE", 2 * I * J * D_OUT)  # two samples at a time
    x, w = torch.randn(5, I, D_IN).double().requires_grad_(), torch.randn(I, J, D_OUT, D_IN).double().requires_grad_()
    prior, bias = torch.randn(I, J).double().requires_grad_(), torch.randn(J, D_OUT).double().requires_grad_()
    convention = Convention(softmax, logits, squash)
    chunked = convention(x, w, prior=prior, bias=bias, num_iterations=3, detach=detach)
    whole = plain_routing(x, w, prior, bias, 3, convention, detach=detach).poses
    torch.testing.assert_close(chunked, whole)
    grad = torch.randn(5, J, D_OUT).double()
    for a, b in zip(
        *(torch.autograd.grad(v, (x, w, prior, bias), grad, allow_unused=True) for v in (chunked, whole)), strict=True
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    empty = convention(x[:0], w, num_iterations=3)
    assert empty.shape == (0, J, D_OUT)
    assert torch.autograd.grad(empty.sum(), w)[0].eq(0).all()


@pytest.mark.parametrize("name", ["gram-ai", "cedrickchee", "higgsfield"])
def test_conventions_take_less_memory_than_their_layers(name):
    """At 64 samples x 200 x 10 x 16 the votes alone take 8 MB."""
    B, I, J, D_in, D_out = 64, 200, 10, 8, 16
    layer = {
        "gram-ai": lambda: gram_ai.CapsuleLayer(J, I, D_in, D_out),
        "cedrickchee": lambda: cedrickchee.CapsuleLayer(D_in, I, J, D_out, True, 3),
        "higgsfield": lambda: higgsfield.DigitCaps(J, I, D_in, D_out),
    }[name]()
    shape = (B, D_in, I) if name == "cedrickchee" else (B, I, D_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = replace_capsules(layer, torch.randn(shape)).layers[0]
    assert row.before.peak > 4 * B * I * J * D_out
    assert row.after.peak < (row.before.peak if name == "gram-ai" else row.before.peak / 3)
