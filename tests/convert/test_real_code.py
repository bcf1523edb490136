"""The program that tries public networks, on a small made-up source."""

import json
import sys
from argparse import Namespace

import definitions
import pytest
import real_code
import torch
from real_sources import SOURCES, Source, mistakes, rand

from fastcaps.doctor import FINE, SUSPICIOUS, UNKNOWN, WRONG, Finding
from fastcaps.doctor.finding import BATCH_MATES, ITERATIONS, SOFTMAX_AXIS, ZERO_CAPSULES

LAYER = """
import package_that_is_nowhere.parts as parts
from package_that_is_nowhere import Base, option
from .sizes import ROUTINGS
import torch
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRAINER = parts.Trainer(DEVICE)

class Config(Base):
    optimizer = option("adam")

class Capsule(nn.Module):
    def __init__(self, I, D_in, J, D_out):
        super().__init__()
        self.weights = nn.Parameter(0.1 * torch.randn(1, I, J, D_out, D_in))
        self.num_routing = ROUTINGS + extra

    def forward(self, x):
        u = (self.weights @ x[:, :, None, :, None]).squeeze(-1)
        b = torch.zeros(u.shape[:3]).cuda()
        for _ in range(self.num_routing):
            s = (b.softmax(2)[..., None] * u).sum(1)
            n2 = (s * s).sum(-1, keepdim=True)
            v = s * n2 / (1 + n2) / (n2 + 1e-8).sqrt()
            b = b + (u * v[:, None]).sum(-1)
        return v

raise SystemExit("a script: it would train here")
"""


@pytest.fixture
def as_before(monkeypatch):
    """Finders and modules are afterwards what they were."""
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("made_up", "a-notebook")]:
        del sys.modules[name]


@pytest.fixture
def source(tmp_path, monkeypatch, as_before):
    package = tmp_path / "owner" / "name" / "made_up"
    package.mkdir(parents=True)
    (package / "layer.py").write_text(LAYER)
    (package / "sizes.py").write_text("ROUTINGS = 2\n")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    return Source(
        "owner/name", "", "made_up.layer", lambda m: m.Capsule(6, 4, 3, 8), rand(6, 4), mistakes(SOFTMAX_AXIS),
        given={"made_up.layer": {"extra": 1}},
    )  # fmt: skip


def test_a_source_is_tried(source, tmp_path):
    result = real_code.one(source, tmp_path)
    (layer,) = result["conversion"]["layers"]
    assert layer["replaced"]
    assert layer["recipe"] == "capsule"
    assert layer["training_before_ms"] > 0
    assert layer["forward_after_ms"] > 0
    assert result["doctor"]["false_alarms"] == []
    assert result["doctor"]["missed"] == [SOFTMAX_AXIS]  # the "truth" of this source is made up


def test_only_definitions_are_run(source, tmp_path):
    module = definitions.load([tmp_path / "owner" / "name"], "made_up.layer", source.given)
    assert not hasattr(module, "TRAINER")  # what calls something is not run
    assert torch.device("cpu") == module.DEVICE
    assert module.Config.__bases__ == (object,)
    assert isinstance(module.parts.anything.at_all(1), definitions.Missing)


def test_a_notebook_is_a_module(tmp_path, as_before):
    cells = [["%matplotlib inline\n", "def f():\n", "    return 1\n"], ["print 'Python 2'\n"], ["g = f\n"]]
    notebook = {"cells": [{"cell_type": "code", "source": cell} for cell in cells]}
    (tmp_path / "a-notebook.ipynb").write_text(json.dumps(notebook))
    assert definitions.load([tmp_path], "a-notebook").g() == 1


def test_findings_are_judged():
    source = Namespace(mistakes=mistakes(SOFTMAX_AXIS, BATCH_MATES, ITERATIONS), arguable=mistakes("arguable"))
    verdicts = [
        (SOFTMAX_AXIS, UNKNOWN), (SOFTMAX_AXIS, WRONG), (BATCH_MATES, FINE), (ITERATIONS, UNKNOWN),
        (ZERO_CAPSULES, WRONG), ("arguable", WRONG), ("odd", SUSPICIOUS),
    ]  # fmt: skip
    assert real_code.judged([Finding(check, "", verdict, "") for check, verdict in verdicts], source) == {
        "found": [SOFTMAX_AXIS],
        "false_alarms": [ZERO_CAPSULES],
        "suspicions": ["odd"],
        "missed": [BATCH_MATES],
        "not_checked": [ITERATIONS],
    }


def test_each_source_has_a_name_of_its_own():
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    assert all(len(source.commit) == 40 for source in SOURCES)


def test_missing_sources_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["real_code.py", "--sources", str(tmp_path), "--only", "XifengGuo"])
    assert real_code.main() == 1
    assert capsys.readouterr().out.startswith("missing: XifengGuo/CapsNet-Pytorch at ")
