"""``fastcaps doctor``: models from files of one's own, and checkpoints."""

import sys

import pytest
import torch
from peers import xifengguo
from safetensors.torch import save_file
from support.networks_to_examine import BATCH, INPUTS, ITERATIONS, KNOWN, SCRAMBLED, SMALL, SOFTMAX, SQUASH, ZERO

from fastcaps import cli
from fastcaps.convert.checkpoints import convert_checkpoint

SCRIPT = """
import torch
from peers import gram_ai, seed
from torch import nn
S = {"size": 12, "kernel": 3, "stem": 5, "types": 3, "dim": 4}
def alone(): return seed.Network(**S)
def with_sample(): return gram_ai.Network(**S), torch.rand(7, 1, 12, 12)
def everything():
    return {"model": seed.Network(**S), "sample": torch.rand(7, 1, 12, 12), "reconstruction_loss": nn.MSELoss()}
def old_names():
    return {"model": seed.Network(**S), "sample": torch.rand(7, 1, 12, 12), "reconstruction": nn.MSELoss()}
class Broken(seed.Network):
    def forward(self, images):
        poses = self.primary(self.conv1(images)).flatten(2)
        lengths = poses.norm(dim=2)
        return lengths * poses
def broken(): return Broken(**S)
def broken_with_sample(): return Broken(**S), torch.rand(7, 1, 12, 12)
def nothing(): return 3
def sized(n): return seed.Network(**S)
"""


def test_the_command(tmp_path, capsys, monkeypatch):
    file = tmp_path / "some_model.py"
    file.write_text(SCRIPT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["doctor", f"{file}:alone", "--image-shape", "1", "12", "12"]) == 0
    assert "0 of 15 checks found something wrong" in capsys.readouterr().out
    assert cli.main(["doctor", f"{file}:with_sample"]) == 1
    out = capsys.readouterr().out
    assert "WRONG       softmax over the output capsules, digit_capsules" in out
    assert cli.main(["doctor", f"{file}:everything"]) == 1
    assert "averaged over the pixels" in capsys.readouterr().out
    with pytest.warns(DeprecationWarning, match=r"key 'reconstruction' of what old_names\(\) returns is now"):
        assert cli.main(["doctor", f"{file}:old_names"]) == 1
    assert "averaged over the pixels" in capsys.readouterr().out
    assert cli.main(["doctor", f"{file}:with_sample", "--image-shape", "1", "12", "12"]) == 2
    assert "--image-shape has nothing to say" in capsys.readouterr().err
    (tmp_path / "m.txt").write_text(SCRIPT)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    (tmp_path / "random.py").write_text("def build(): pass")
    import random

    for target, text in {
        str(file): "which function of",
        f"{tmp_path}/m.txt:alone": "is no .py file",
        f"{tmp_path}/broken.py:build": "cannot be imported: ModuleNotFoundError",
        f"{tmp_path}/random.py:build": "must return a module",
        f"{file}:sized": "must be a function without arguments",
        f"{file}:nothing": "must return a module, (module, sample), or a dict with model, sample, margin_loss",
        f"{file}:missing": "has no function 'missing'",
        f"{tmp_path}/no.py:build": "there is no file",
        f"{file}:alone": "the model takes none of these images; give --image-shape C H W",
        f"{tmp_path}/no.pt": "there is no file",
    }.items():
        assert cli.main(["doctor", target]) == 2
        assert text in capsys.readouterr().err
    assert sys.modules["random"] is random


@pytest.mark.parametrize("name", KNOWN)
def test_a_checkpoint_tells_what_is_known_of_its_network(name, tmp_path, capsys):
    module, mistakes = KNOWN[name]
    torch.save(module.Network(**SMALL).state_dict(), tmp_path / "a.pt")
    assert cli.main(["doctor", str(tmp_path / "a.pt")]) == (1 if mistakes else 0)
    out = capsys.readouterr().out
    assert f"the network of {name}, run as it is converted" in out
    checks = (SCRAMBLED, ZERO, BATCH, SOFTMAX, ITERATIONS, SQUASH, INPUTS)
    found = {check for check in checks if f"WRONG       {check}" in out}
    # What a square root does to a gradient does not stand in a checkpoint.
    assert found == mistakes - {"danielhavir": {ZERO}}.get(name, set())
    assert not [check for check in found if f"FINE        {check}" in out]
    assert out.count("(known of this network, not computed)") == (2 if name == "cedrickchee" else 0)


def test_our_own_file_and_other_files(tmp_path, capsys):
    convert_checkpoint(xifengguo.Network(**SMALL).state_dict(), "xifengguo").save(tmp_path / "a.safetensors")
    assert cli.main(["doctor", str(tmp_path / "a.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "a fastcaps.CapsNet: 1 of" in out
    assert f"WRONG       {SCRAMBLED}" in out
    assert cli.main(["doctor", str(tmp_path / "a.safetensors"), "--image-shape", "3", "12", "12"]) == 2
    assert "is of a network for images (1, 12, 12), not --image-shape" in capsys.readouterr().err
    save_file({"a": torch.ones(1)}, tmp_path / "damaged.safetensors", {"fastcaps": "{"})
    assert cli.main(["doctor", str(tmp_path / "damaged.safetensors")]) == 2
    assert "says of itself is not JSON" in capsys.readouterr().err
    torch.save({"a": torch.ones(1)}, tmp_path / "b.pt")
    assert cli.main(["doctor", str(tmp_path / "b.pt")]) == 2
    assert "is of no network that is known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "status"),
    [(["broken_with_sample"], 1), (["broken", "--image-shape", "1", "12", "12"], 1), (["broken"], 2)],
)
def test_a_model_that_does_not_run(target, status, tmp_path, capsys, monkeypatch):
    """Of images that are only guessed, the shape may be wrong: the same is said, but the model is not blamed."""
    file = tmp_path / "some_model.py"
    file.write_text(SCRIPT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["doctor", f"{file}:{target[0]}", *target[1:]]) == status
    said = "".join(capsys.readouterr())
    assert "some_model.py:" in said
    assert "return lengths * poses" in said
    assert "lengths has no axis for" in said
    if status == 1:
        assert "WRONG       it runs, the model: RuntimeError: The size of tensor a" in said
        assert "1 of 1 checks found something wrong" in said
    else:
        assert "give --image-shape C H W" in said
        assert "(1, 28, 28) comes furthest" in said


def test_findings_are_printed_as_they_are_found(tmp_path, capsys, monkeypatch):
    """An interruption loses nothing of what was found."""
    file = tmp_path / "some_model.py"
    file.write_text(SCRIPT)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastcaps.doctor.checks.initialisation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["doctor", f"{file}:with_sample"])
    assert "WRONG       softmax over the output capsules, digit_capsules" in capsys.readouterr().out
