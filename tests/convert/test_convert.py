"""Converted layers at work: in containers, wrappers and copies, with recipes of one's own, and in training."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import seed
from support.layers_to_convert import (
    BY_NAME,
    D_IN,
    D_OUT,
    LAYERS,
    I,
    J,
    gradients,
    poses_for,
    quietly,
    train_steps,
)
from torch import nn

from fastcaps.convert import RECIPES, ConvertedCapsules, Recipe
from fastcaps.convert.cases import Weights, cases
from fastcaps.convert.converted import Plan

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


@pytest.mark.compiler
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
@pytest.mark.compiler
def test_compiles_without_a_graph_break(name):
    layer, x = LAYERS[name](), poses_for(name)
    quietly(layer, x)
    wanted = gradients(layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(wanted, gradients(compiled, x), strict=True):
        torch.testing.assert_close(a, b)


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
    assert "output 2: the old layer returns (4, 5, 11)" in str(report)
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


def test_no_case_has_two_axes_of_one_size_by_its_batch():
    layer = seed.Capsule(I, 5, 6, 3, 3)  # D_in 5, J 6, D_out 3
    plan = Plan.of(BY_NAME["capsule"], layer)
    found = list(cases(layer, plan, torch.randn(7, I, 5), 3, torch.float64))
    assert {(case.source, len(case.poses)) for case in found} == {("the sample", 4), ("random poses", 7)}
    assert {case.weights for case in found} == set(Weights)


# -------------------------------------------------------------------------------------------------------- training on


@pytest.mark.parametrize("name", ["capsule", "adambielski", "sabour", "cedrickchee"])
def test_a_training_continues_across_the_swap(name):
    batches = [poses_for(name, B=6, dtype=torch.float64) for _ in range(100)]
    plain = nn.Sequential(LAYERS[name]()).double()
    for p in plain.parameters():
        p.data.mul_(3)
    swapped = copy.deepcopy(plain)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.02) for model in (plain, swapped)]
    train_steps(plain, optimizers[0], batches)
    train_steps(swapped, optimizers[1], batches[:50])
    assert quietly(swapped, batches[0]).replaced
    train_steps(swapped, optimizers[1], batches[50:])
    for a, b in zip(plain.parameters(), swapped.parameters(), strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-9 * torch.linalg.vector_norm(a)


DISTRIBUTED = """
import copy, os, sys, torch
sys.path.insert(0, "tests")
from support.layers_to_convert import D_IN, LAYERS, I, quietly, train_steps
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
plain = torch.nn.Sequential(LAYERS["capsule"]()).double()
for p in plain.parameters():
    p.data.mul_(3)
models = [torch.nn.parallel.DistributedDataParallel(m) for m in (plain, copy.deepcopy(plain))]
batches = [torch.randn(6, I, D_IN, dtype=torch.float64)[3 * rank : 3 * rank + 3] for _ in range(100)]
optimizers = [torch.optim.Adam(m.parameters(), lr=0.02) for m in models]
train_steps(models[0], optimizers[0], batches)
train_steps(models[1], optimizers[1], batches[:50])
assert quietly(models[1], batches[0]).replaced == ["module.0"]
train_steps(models[1], optimizers[1], batches[50:])
a, b = (m.module[0].weights.detach() for m in models)
assert torch.linalg.vector_norm(a - b) <= 1e-9 * torch.linalg.vector_norm(a), (a - b).abs().max()
others = [torch.empty_like(b) for _ in range(2)]
torch.distributed.all_gather(others, b)
assert torch.equal(*others)
print("equal", rank, flush=True)
torch.distributed.barrier()
os._exit(0)  # now and then gloo's threads abort a process that tears itself down, with or without destroy_process_group
"""


@pytest.mark.process
def test_a_distributed_training_continues_across_the_swap(tmp_path):
    """Two gloo processes."""
    script = tmp_path / "two.py"
    script.write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    run = subprocess.run(
        [*command, "--rdzv-endpoint=localhost:0", str(script)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("equal") == 2, run.stdout
