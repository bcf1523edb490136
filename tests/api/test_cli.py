"""The command line, the demo and the digits."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from support.processes import python

import fastcaps
from fastcaps import cli
from fastcaps.data import digits

ROOT = Path(__file__).parents[2]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = [action for action in cli.build_parser()._actions if action.dest == "command"]
    return action.choices


@pytest.mark.parametrize("command", [None, *subcommands()])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"] if command is None else [command, "--help"])
    assert stop.value.code == 0
    assert f"usage: fastcaps {command or '[-h]'}" in capsys.readouterr().out


@pytest.mark.process
def test_it_is_a_module():
    result = python("-m", "fastcaps", "--version")
    assert result.stdout == f"fastcaps {fastcaps.__version__}\n", result.stderr


def test_info_names_versions_and_reasons(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch      {torch.__version__.split('+')[0]}" in out
    assert "native     on cpu   can run" in out
    assert "triton     on cpu   the Triton kernels are for CUDA tensors" in out
    assert "reference  on cpu   can run" in out


def test_selftest_prints_every_backend(capsys):
    assert cli.main(["selftest"]) == 0
    out = capsys.readouterr().out
    assert "native     cpu   float32" in out
    assert "reference  cpu   bfloat16" in out


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["demo", "--epochs", "0"], ["demo", "--epochs", "many"]], ids=str
)
def test_bad_arguments_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: fastcaps" in capsys.readouterr().err


@pytest.mark.train
def test_demo_in_small(tmp_path, capsys):
    """One epoch: the error is far below chance (90 %), and the pictures are there."""
    assert cli.main(["demo", "--out", str(tmp_path / "pictures"), "--epochs", "1", "--rounds", "0"]) == 0
    out = capsys.readouterr().out
    error = float(out.split("test error ")[-1].split(" %")[0])
    assert error < 60
    for name in ("training", "reconstructions", "coupling", "perturbations"):
        header = (tmp_path / "pictures" / f"{name}.png").read_bytes()[:8]
        assert header == b"\x89PNG\r\n\x1a\n"


def test_digits():
    data = digits()
    assert data.train_images.shape == (1438, 1, 8, 8)
    assert data.test_images.shape == (359, 1, 8, 8)
    assert data.train_images.min() == 0
    assert data.train_images.max() == 1
    assert set(data.test_labels.tolist()) == set(range(data.num_classes))
    again = digits()
    assert torch.equal(data.test_images, again.test_images)
    everything = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # no test digit is among the training digits


@pytest.mark.parametrize("arguments", [["tune", *"12345"], ["convert", "a.pt", "--recipe", "r", "--out", "b"]], ids=str)
def test_iterations_is_the_old_name_of_num_iterations(arguments, capsys):
    parse = cli.build_parser().parse_args
    assert parse([*arguments, "--num-iterations", "7"]).num_iterations == 7
    assert parse(arguments).num_iterations == 3
    assert not capsys.readouterr().err
    assert parse([*arguments, "--iterations", "7"]).num_iterations == 7
    assert capsys.readouterr().err == f"fastcaps {arguments[0]}: note: --iterations is now --num-iterations\n"


def test_refusals_are_one_line_and_mistakes_keep_their_traceback(capsys):
    with cli.refusals("doctor", (OSError, ValueError)):
        raise FileNotFoundError("there is no file 'a'")
    assert capsys.readouterr().err == "fastcaps doctor: there is no file 'a'\n"
    with pytest.raises(RuntimeError, match="a mistake"), cli.refusals("doctor", (OSError, ValueError)):
        raise RuntimeError("a mistake")


def test_every_command_has_its_status_of_refusal(monkeypatch, capsys):
    assert cli.main(["doctor", "nowhere.pt"]) == 2
    assert cli.main(["evaluate", "nowhere.safetensors"]) == 1

    def wrong():
        raise RuntimeError("wrong numbers")

    monkeypatch.setattr(fastcaps, "selftest", wrong)
    assert cli.main(["selftest"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "fastcaps selftest: wrong numbers"


def test_a_missing_package_is_named_with_its_cure(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fastcaps.demo", raising=False)
    monkeypatch.setitem(sys.modules, "rich.box", None)
    assert cli.main(["demo"]) == 1
    assert "fastcaps demo: rich.box is missing: pip install --no-build-isolation '.[train]'" in capsys.readouterr().err
    with cli.refusals("doctor", ()):
        raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")
    assert capsys.readouterr().err == "fastcaps doctor: safetensors is missing: pip install safetensors\n"
    monkeypatch.setitem(sys.modules, "fastcaps.doctor.targets", None)
    with pytest.raises(ModuleNotFoundError, match=r"fastcaps\.doctor\.targets"):  # a mistake of fastcaps itself
        cli.main(["doctor", "a.pt"])
    with cli.refusals("demo", ()):
        raise ModuleNotFoundError("the digits come with scikit-learn")
    assert capsys.readouterr().err == "fastcaps demo: the digits come with scikit-learn\n"


def test_memory_that_runs_out_is_told_from_a_mistake():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert cli.out_of_memory(raised.value)
    assert cli.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not cli.out_of_memory(raised.value)
