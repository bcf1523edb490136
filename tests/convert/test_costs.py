"""What a conversion takes and gives: memory of the comparison, times before and after, and who decides by them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peers import cedrickchee, gchochla, gram_ai, leftthomas, seed, xifengguo
from support.layers_to_convert import COLUMNS, D_OUT, LAYERS, J, poses_for, quietly
from torch import nn

from fastcaps.convert import ConvertedCapsules, Recipe, replace_capsules
from fastcaps.convert.comparison import verify
from fastcaps.convert.converted import Plan
from fastcaps.convert.memory import needed_memory
from fastcaps.convert.recipes import find_recipe
from fastcaps.measure import Cost, free_memory, training_cost

# ------------------------------------------------------------------------------------------------------------- memory

LARGE = {  # votes are 96 times smaller than the weight; and how often its float32 size is held, at most
    "capsule": (lambda: seed.Capsule(12, 96, 7, 40, 3), 10),
    "gchochla": (lambda: gchochla.SemanticCaps(7, 12, 40, 96, 3), 11),  # its weight lies in another order
    "gram-ai": (lambda: gram_ai.CapsuleLayer(7, 12, 96, 40), 20),  # 17 in the layer itself, for 4 samples
    "xifengguo": (lambda: xifengguo.DenseCapsule(12, 96, 7, 40, 3), 21),  # 18
    "cedrickchee": (lambda: cedrickchee.CapsuleLayer(96, 12, 7, 40, True, 5), 30),  # in the converted layer, as T = 5
    "leftthomas-shared": (lambda: leftthomas.CapsuleLinear(7, 96, 40), 202),  # 12 input capsules share it
}


@pytest.mark.parametrize("name", LARGE)
def test_what_a_comparison_holds(name):
    """In float64, which doubles all: a copy, the gradients of two results, and a run; or a copy and the old layer's."""
    (make, most), recipe, x = LARGE[name], find_recipe(name), torch.randn(64, 12, 96)
    layer, x, verdicts = make(), x.mT if name in COLUMNS else x, []
    peak = training_cost(lambda: verdicts.append(verify(layer, recipe, (x,), {})), "cpu", rounds=1).peak
    weight = sum(4 * p.numel() for p in layer.parameters())
    plan = Plan.of(recipe, layer)
    needed = needed_memory(layer, plan, *plan.bind(layer, (x,), {}))
    assert verdicts[-1].refused is None
    assert peak / weight < most < peak / weight + 2  # another copy in float64 is 2
    assert peak <= needed < 1.25 * max(peak, 20 * weight)  # as if the layer repeated its weight for each sample


class Votes(nn.Module):
    """Votes [B, I, J, D_out] with a logit for each entry, which is the most that is known of layers."""

    def __init__(self, num_iterations):
        super().__init__()
        self.num_iterations = num_iterations

    def forward(self, u):
        b = torch.zeros_like(u)
        for _ in range(self.num_iterations):
            s = (b.softmax(2) * u).sum(1, keepdim=True)
            n = s.norm(dim=-1, keepdim=True)
            v = s * n / (1 + n * n)
            b = b + (u * v).sum(-1, keepdim=True)
        return v[:, 0]


@pytest.mark.parametrize("T", [1, 3, 8])
def test_what_the_comparison_of_votes_needs(T):
    layer, x = Votes(T), torch.randn(6, 100, 7, 16)
    recipe = Recipe("votes", "Votes", weight=None, num_iterations="num_iterations", input="B I J D_out")
    peak = training_cost(lambda: verify(layer, recipe, (x,), {}), "cpu", rounds=1).peak
    assert verify(layer, recipe, (x,), {}).refused is None
    assert peak <= needed_memory(layer, Plan.of(recipe, layer), x, T) < 2 * peak


def test_without_the_memory_the_layer_stays_and_one_line_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("fastcaps.convert.memory.free_memory", lambda device: 200_000)
    layer = LAYERS["capsule"]()
    report = quietly(layer, poses_for("capsule"))
    assert report.replaced == []
    reason = report.layers[0].reason
    assert "comparing it takes up to 0.3 MB of memory, and 0.2 MB are free: free some" in reason
    assert "\n" not in reason
    monkeypatch.setattr("fastcaps.convert.memory.free_memory", lambda device: None)  # a system that does not tell
    assert quietly(layer, poses_for("capsule")).replaced == [""]


def test_free_memory():
    free = free_memory("cpu")
    if sys.platform != "linux":
        assert free is None or free > 0
    else:
        assert free is not None
        assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# -------------------------------------------------------------------------------------------------------------- times


def costs(monkeypatch, *milliseconds):
    """Let these times be measured: of old and new layer in turn."""
    given = iter(milliseconds)
    monkeypatch.setattr("fastcaps.convert.replace.training_cost", lambda step, device: Cost(next(given), 1000))


def test_a_layer_that_gets_slower_is_replaced_and_the_report_says_so(monkeypatch):
    costs(monkeypatch, 61.0, 107.0)
    with pytest.warns(UserWarning, match="input capsules"):
        report = replace_capsules(LAYERS["labml"](), poses_for("labml"))
    assert report.replaced == [""]
    assert "got slower: 61 ms before, 107 ms after; only_if_faster=True leaves such a layer" in str(report)
    costs(monkeypatch, 61.0, 62.0)  # as times vary
    assert "slower" not in str(replace_capsules(LAYERS["capsule"](), poses_for("capsule")))


def test_only_if_faster_leaves_what_is_not(monkeypatch):
    model = nn.Sequential(LAYERS["capsule"](), seed.Capsule(J, D_OUT, 3, 4, 3))
    x = poses_for("capsule")
    before = model(x)
    costs(monkeypatch, 10.0, 5.0, 10.0, 10.0)
    report = replace_capsules(model, x, only_if_faster=True)
    assert report.replaced == ["0"]
    assert type(model[1]) is seed.Capsule
    assert report.layers[1].reason == "it would not be faster"
    assert "10, 10" in str(report)
    torch.testing.assert_close(model(x), before)

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fastcaps.convert.replace.training_cost", fail)
    layer = LAYERS["capsule"]()
    report = replace_capsules(layer, x, only_if_faster=True)  # what was not measured is not known to be faster
    assert report.replaced == []
    assert report.layers[0].reason.startswith("its time could not be measured")
    assert not isinstance(layer, ConvertedCapsules)
    with pytest.raises(ValueError, match="only_if_faster needs measure=True"):
        replace_capsules(layer, x, only_if_faster=True, measure=False)


def test_no_warning_for_a_layer_that_stays(monkeypatch, recwarn):
    costs(monkeypatch, 61.0, 107.0)
    assert replace_capsules(LAYERS["labml"](), poses_for("labml"), only_if_faster=True).replaced == []
    assert not [one for one in recwarn if "not the paper's" in str(one.message)]


DISTRIBUTED = """
import os, sys, torch
sys.path.insert(0, "tests")
from support.layers_to_convert import LAYERS, poses_for
import fastcaps.convert.replace as replacing
from fastcaps.measure import Cost
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
times = iter([[10.0, 5.0, 10.0, 20.0], [10.0, 20.0, 10.0, 5.0]][rank])
replacing.training_cost = lambda step, device: Cost(next(times), 1000)
torch.manual_seed(rank)
model = torch.nn.ModuleDict({name: LAYERS["capsule"]() for name in ("a", "b")})
model.forward = lambda x: model["a"](x) + model["b"](x)
report = replacing.replace_capsules(model, poses_for("capsule"), only_if_faster=True)
assert report.replaced == ["a"], report
print("equal", rank, flush=True)
torch.distributed.barrier()
os._exit(0)  # now and then gloo's threads abort a process that tears itself down
"""


@pytest.mark.process
def test_the_first_process_of_a_group_decides_for_all(tmp_path):
    """Two gloo processes that measure the opposite."""
    script = tmp_path / "two.py"
    script.write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    run = subprocess.run(
        [*command, "--rdzv-endpoint=localhost:0", str(script)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("equal") == 2, run.stdout
