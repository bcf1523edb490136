"""Drop-in conversion: every published layer is recognised and equal, every wrong recipe is refused."""

import copy
import dataclasses
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peers import (
    cedrickchee,
    gram_ai,
    higgsfield,
    readable_capsnet,
    seed,
)
from support.layers_to_convert import BY_NAME, D_IN, D_OUT, LAYERS, WRONG, I, J, gradients, poses_for, quietly
from torch import nn

import fastcaps
from fastcaps.convert import RECIPES, ConvertedCapsules, Recipe, replace_capsules
from fastcaps.convert.comparison import LIMIT
from fastcaps.routing.conventions import Convention, plain_routing

# --------------------------------------------------------------------------------------------- recognised and equal


@pytest.mark.parametrize("T", [1, 2, 3, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_every_published_layer_is_replaced_and_equal(name, T):
    """Twice: by the report, and here once more, on poses and weights that the verification has not seen."""
    layer = LAYERS[name](T)
    old = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    report = quietly(model, poses_for(name))
    assert report.replaced == ["0"], str(report)
    assert isinstance(model[0], ConvertedCapsules)
    assert isinstance(model[0], type(old))
    assert report.layers[0].recipe == name
    norm_eps = BY_NAME[name].norm_eps
    allowed = 1e-5 if norm_eps else LIMIT
    assert report.layers[0].output < allowed
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
    parameters, state = dict(layer.named_parameters()), {k: v.clone() for k, v in layer.state_dict().items()}
    calls = []
    hook = layer.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    layer.eval()
    assert quietly(nn.Sequential(layer), poses_for(name)).replaced
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


# ------------------------------------------------------------------------------------------ a wrong recipe is refused


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
        "squash": [{"norm": "elementwise", "elementwise": "norm"}[recipe.squash]],
        "leaky": [True],
        "detach": [not recipe.detach],
        "eps": [0.0 if recipe.eps else 1e-8, 1e-12],
        "norm_eps": [0.0 if recipe.norm_eps else 1e-8],
        **swapped,
    }
    if recipe.prior is None:
        values["prior_axes"] = []  # nothing to arrange
    if recipe.bias is None:
        values["bias_axes"] = []
    assert values.keys() == {f.name for f in dataclasses.fields(Recipe)} - {"name"}
    return [(name, value) for name, options in values.items() for value in options]


NAMED = {"softmax", "logits", "squash", "detach", "leaky", "offset", "eps", "norm_eps"}


@pytest.mark.parametrize("T", [3, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_each_flag_flipped_is_refused_and_named(name, T):
    recipe = BY_NAME[name]
    if T == 1 and name == "higgsfield":
        pytest.skip("its three iterations are written into it")
    for flag, value in flips(recipe, T):
        layer = LAYERS[name](T)
        if flag in ("eps", "norm_eps") and (recipe.norm_eps if flag == "eps" else recipe.eps) and value:
            with pytest.raises(ValueError, match="eps and norm_eps exclude each other"):
                dataclasses.replace(recipe, **{flag: value})
            continue
        wrong = dataclasses.replace(recipe, **{flag: value})
        report = quietly(nn.Sequential(layer), poses_for(name), recipes=[wrong])
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


# ------------------------------------------------------------------------------- wrong conventions, with memory bounded


@pytest.mark.parametrize("name", WRONG)
def test_wrong_conventions_are_kept_with_a_warning_or_fixed(name):
    x = poses_for(name)
    with pytest.warns(UserWarning, match=WRONG[name]):
        replace_capsules(nn.Sequential(LAYERS[name]()), x, measure=False)
    layer = LAYERS[name]()
    with pytest.warns(UserWarning, match="measure the accuracy again"):
        replace_capsules(nn.Sequential(layer), x, fix=True, measure=False)
    alone = torch.cat([layer(x[b : b + 1]) for b in range(len(x))], 1 if name == "gram-ai" else 0)
    torch.testing.assert_close(layer(x), alone)  # no sample sees its batch mates
    recipe = BY_NAME[name]
    if name == "gram-ai":
        canonical = layer.route_weights.permute(1, 0, 3, 2)
    else:
        canonical = layer.weight[0] if name == "cedrickchee" else layer.W[0]
    poses = x.mT if name == "cedrickchee" else x
    wanted = fastcaps.dynamic_routing(poses, canonical, num_iterations=3)
    out = layer(x).squeeze()
    torch.testing.assert_close(out.transpose(0, 1) if name == "gram-ai" else out, wanted)
    assert recipe.convention.effects


@pytest.mark.parametrize("logits", ["sample", "batch"])
@pytest.mark.parametrize("softmax", ["outputs", "inputs"])
@pytest.mark.parametrize("squash", ["norm", "elementwise"])
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


# ----------------------------------------------------------------------------------------------- where layers may stand


class Head(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(D_IN, D_IN), layer)])
        self.same = layer  # one layer under two names

    def forward(self, x):
        return self.same(self.blocks[0](x).new_ones(1) * x) + self.blocks[0](x)


def test_inside_containers_and_under_two_names():
    layer = LAYERS["capsule"]()
    model, x = Head(layer), torch.randn(3, I, D_IN)
    before = model(x)
    report = quietly(model, x)
    assert report.replaced == ["blocks.0.1"]
    assert model.same is layer
    assert isinstance(model.same, ConvertedCapsules)
    torch.testing.assert_close(model(x), before)
    assert quietly(model, x).layers == ()  # what is ours is not converted again


def test_inside_data_parallel_and_compiled_wrappers():
    x = torch.randn(3, I, D_IN)
    wrapped = nn.DataParallel(nn.Sequential(LAYERS["capsule"]()))
    before = wrapped(x)
    assert quietly(wrapped, x).replaced == ["module.0"]
    torch.testing.assert_close(wrapped(x), before)
    compiled = torch.compile(nn.Sequential(LAYERS["capsule"]()), backend="aot_eager", fullgraph=True)
    before = compiled(x)
    assert quietly(compiled, x).replaced == ["_orig_mod.0"]
    traced = []
    torch.testing.assert_close(compiled(x), before)  # compiled anew, as the class of a module changed
    again = torch.compile(
        compiled._orig_mod, backend=lambda graph, _: traced.append(graph) or graph.forward, fullgraph=True
    )
    torch.testing.assert_close(again(x), before)
    names = [str(node.target) for node in traced[0].graph.nodes if node.op == "call_function"]
    assert any("fastcaps" in name for name in names), names


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_without_a_graph_break(name):
    layer, x = LAYERS[name](), poses_for(name)
    quietly(layer, x)
    wanted = gradients(layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(wanted, gradients(compiled, x), strict=True):
        torch.testing.assert_close(a, b)


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


def test_half_precision_and_autocast():
    layer, x = LAYERS["gram-ai"](), torch.randn(3, I, D_IN)
    quietly(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer(x)
    torch.testing.assert_close(mixed.float(), layer(x), rtol=0.1, atol=0.1)
    layer = LAYERS["capsule"]().to(torch.bfloat16)
    report = quietly(layer, x.to(torch.bfloat16))
    assert report.replaced == [""]
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- recipes of one's own


class WithCoupling(nn.Module):
    """Returns the poses as [J, D_out, B] and the coupling as [B, J, I]; a mask of the weight's sharing is its own."""

    def __init__(self, detach=False):
        super().__init__()
        self.W, self.routings, self.detach = nn.Parameter(torch.randn(J, D_OUT, D_IN)), 3, detach

    def forward(self, x):
        u = torch.einsum("jok,bik->bijo", self.W, x)
        b = x.new_zeros(u.shape[:3])
        for n in range(self.routings):
            c = b.softmax(2)
            s = torch.einsum("bij,bijo->bjo", c, u)
            v = s * s.norm(dim=2, keepdim=True) / (1 + s.pow(2).sum(2, keepdim=True))
            if n < self.routings - 1:
                b = b + torch.einsum("bijo,bjo->bij", u, v)
        return v.permute(1, 2, 0), c.mT


MINE = Recipe("mine", "WithCoupling", "W", "J D_out D_in", num_iterations="routings", output=("J D_out B", "B J I"))


def test_a_recipe_of_ones_own_with_coupling():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = WithCoupling()

        def forward(self, x):
            v, c = self.layer(x)
            return v.sum() + (c * c).sum()

    for T in (1, 3):
        model, x = Both(), torch.randn(4, I, D_IN)
        model.layer.routings = T
        wanted = [*model.layer(x), *gradients(model, x)]
        report = quietly(model, x, recipes=(*RECIPES, MINE))
        assert report.replaced == ["layer"], str(report)
        for a, b in zip(wanted, [*model.layer(x), *gradients(model, x)], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    report = quietly(WithCoupling(), x, recipes=[dataclasses.replace(MINE, output="J D_out B")])
    assert "coupling: the old layer returns (4, 5, 11)" in str(report)
    assert "flag output" in str(report)


def test_a_layer_that_cannot_run_in_float64():
    class Float32Only(seed.Capsule):
        def forward(self, x):
            return (
                super().forward(x * torch.ones((), dtype=torch.float32)).float() if x.dtype == torch.float32 else 1 / 0
            )

    recipe = dataclasses.replace(BY_NAME["capsule"], classes="Float32Only")
    layer = Float32Only(I, D_IN, J, D_OUT, 3)
    report = quietly(layer, torch.randn(3, I, D_IN), recipes=[recipe])
    assert report.replaced == [""]
    assert "compared in float32" in str(report)
    for flag, value in {"eps": 1e-5, "detach": True, "softmax": "inputs", "logits": "batch", "offset": 1}.items():
        wrong = dataclasses.replace(recipe, **{flag: value})
        layer = Float32Only(I, D_IN, J, D_OUT, 3)
        report = quietly(layer, torch.randn(3, I, D_IN), recipes=[wrong])
        assert not report.replaced
        assert f"most likely {flag}=" in str(report)


# -------------------------------------------------------------------------------------------------------- training on


def steps(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        v = model(x)
        (v.flatten(1).norm(dim=1) - x.flatten(1).sum(1).sigmoid()).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["capsule", "adambielski", "sabour", "cedrickchee"])
def test_a_training_continues_across_the_swap(name):
    batches = [poses_for(name, B=6, dtype=torch.float64) for _ in range(100)]
    plain = nn.Sequential(LAYERS[name]()).double()
    for p in plain.parameters():
        p.data.mul_(3)
    swapped = copy.deepcopy(plain)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.02) for model in (plain, swapped)]
    steps(plain, optimizers[0], batches)
    steps(swapped, optimizers[1], batches[:50])
    assert quietly(swapped, batches[0]).replaced
    steps(swapped, optimizers[1], batches[50:])
    for a, b in zip(plain.parameters(), swapped.parameters(), strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-9 * torch.linalg.vector_norm(a)


DISTRIBUTED = """
import copy, os, sys, torch
sys.path.insert(0, "tests")
import test_convert as t
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
plain = torch.nn.Sequential(t.LAYERS["capsule"]()).double()
for p in plain.parameters():
    p.data.mul_(3)
models = [torch.nn.parallel.DistributedDataParallel(m) for m in (plain, copy.deepcopy(plain))]
batches = [torch.randn(6, t.I, t.D_IN, dtype=torch.float64)[3 * rank : 3 * rank + 3] for _ in range(100)]
optimizers = [torch.optim.Adam(m.parameters(), lr=0.02) for m in models]
t.steps(models[0], optimizers[0], batches)
t.steps(models[1], optimizers[1], batches[:50])
assert t.quietly(models[1], batches[0]).replaced == ["module.0"]
t.steps(models[1], optimizers[1], batches[50:])
a, b = (m.module[0].weights.detach() for m in models)
assert torch.linalg.vector_norm(a - b) <= 1e-9 * torch.linalg.vector_norm(a), (a - b).abs().max()
others = [torch.empty_like(b) for _ in range(2)]
torch.distributed.all_gather(others, b)
assert torch.equal(*others)
print("equal", rank, flush=True)
torch.distributed.barrier()
os._exit(0)  # now and then gloo's threads abort a process that tears itself down, with or without destroy_process_group
"""


def test_a_distributed_training_continues_across_the_swap(tmp_path):
    """Two gloo processes."""
    script = tmp_path / "two.py"
    script.write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    run = subprocess.run(
        [*command, "--rdzv-endpoint=localhost:0", str(script)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("equal") == 2, run.stdout
