"""Interrupted, damaged and finished runs that go on."""

import errno
import os
import resource

import pytest
import torch
from safetensors.torch import load_file
from support import interrupted
from support.processes import Forked
from support.training_runs import SMALL, assert_same, course, train

from fastcaps.models import CNN
from fastcaps.train import callbacks, module

pytestmark = pytest.mark.train


def counted_steps(monkeypatch) -> list[int]:
    """The steps that the optimizer makes from now on, one by one."""
    steps, original = [], module.Training.on_before_optimizer_step

    def hook(self, optimizer):
        steps.append(self.global_step)
        original(self, optimizer)

    monkeypatch.setattr(module.Training, "on_before_optimizer_step", hook)
    return steps


@pytest.mark.parametrize(
    ("moment", "at", "status", "kept"),  # by a clock that ticks once a step; kept: how many steps
    [
        ("SIGKILL", 2, -9, 0),  # before the first checkpoint
        ("SIGKILL", 6, -9, 4),  # in the middle of an epoch
        ("SIGKILL", 11, -9, 11),  # right after an epoch
        ("SIGINT", 9, 130, 10),
        ("SIGTERM", 10, 130, 11),  # at the last step of an epoch
        ("SIGINT+SIGINT", 9, -2, 8),  # the second is obeyed at once
        ("write", 2, -9, 4),  # while a checkpoint is half written
        ("checkpoint", 1, -9, 0),  # while it is written, but not renamed
        ("checkpoint", 4, -9, 11),
        ("test", 1, -9, 19),  # during a test
        ("pictures", 1, -9, 19),  # after it
    ],
)
@pytest.mark.usefixtures("no_figures")
def test_a_stopped_run_goes_on_as_if_nothing_had_been(whole, tmp_path, monkeypatch, moment, at, status, kept):
    options = (*SMALL, "--out", str(tmp_path / "run"))
    found, errors = Forked(interrupted.main, moment, str(at), *options, stderr=tmp_path / "stderr").wait()
    assert found == status, errors
    if status == 130:
        assert f"to go on: fastcaps train --resume --out {tmp_path / 'run'}" in errors
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "run" / "run.lock").exists() == (status != 130)  # of a killed process; it keeps nobody out
    steps = counted_steps(monkeypatch)
    assert train(tmp_path / "run", "--resume") == 0
    assert len(steps) == 33 - kept
    assert_same(whole, tmp_path / "run")
    assert course(tmp_path / "run") == course(whole)
    best = [load_file(out / "best.safetensors") for out in (whole, tmp_path / "run")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    assert not list((tmp_path / "run").glob("*.partial"))
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("precision", ["32", "64"])
def test_a_finished_run_can_be_made_longer(tmp_path, monkeypatch, capsys, precision):
    options = [*SMALL, "--schedule", "constant", "--precision", precision]
    assert train(tmp_path / "long", *options) == 0
    assert train(tmp_path / "short", *options, "--epochs", "2") == 0
    with monkeypatch.context() as patch:
        steps = counted_steps(patch)
        assert train(tmp_path / "short", "--resume", "--epochs", "3") == 0
        assert steps == list(range(22, 33))
    assert_same(tmp_path / "long", tmp_path / "short")
    assert train(tmp_path / "short", "--resume") == 0  # nothing is left to do
    assert_same(tmp_path / "long", tmp_path / "short")
    assert train(tmp_path / "short", "--resume", "--epochs", "2") == 1
    assert "epoch 3 has begun already" in capsys.readouterr().err
    assert train(tmp_path / "cosine", *SMALL, "--epochs", "1") == 0
    assert train(tmp_path / "cosine", "--resume", "--epochs", "2") == 1
    assert "epochs was 1 and is now 2" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_the_old_model_stays_until_the_longer_run_has_its_own(tmp_path, monkeypatch):
    assert train(tmp_path, *SMALL, "--epochs", "1", "--schedule", "constant") == 0
    (tmp_path / "report.html").write_text("of the old model")
    before = (tmp_path / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Keeper, "on_train_start", lambda self, *_: setattr(self, "interrupted", True))
        assert train(tmp_path, "--resume", "--epochs", "2") == 130
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert (tmp_path / "report.html").exists()
    assert train(tmp_path, "--resume") == 0
    assert (tmp_path / "model.safetensors").read_bytes() != before
    assert not (tmp_path / "report.html").exists()  # a report that could not be written is not another model's


@pytest.mark.usefixtures("no_figures")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capsys):
    assert train(tmp_path / "run", *SMALL, "--epochs", "1", "--schedule", "constant") == 0
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # a write beyond it fails
    try:
        assert train(tmp_path / "run", "--resume", "--epochs", "2") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{os.strerror(errno.EFBIG)}: '{tmp_path / 'run' / 'last.ckpt'}'" in capsys.readouterr().err
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.partial"))
    assert train(tmp_path / "run", "--resume") == 0


def test_a_disk_that_is_full_for_the_log_is_named(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.Training, "write", full)
    assert train(tmp_path, *SMALL) == 1
    assert f"No space left on device: '{tmp_path}'" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    assert train(tmp_path, *SMALL, "--epochs", "1", "--schedule", "constant") == 0
    last = tmp_path / "last.ckpt"
    content = last.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
    for damaged in (content[:middle], b"", content[:1000] + b"x" * 1000 + content[2000:], flipped):
        last.write_bytes(damaged)
        assert train(tmp_path, "--resume", "--epochs", "2") == 1
        assert f"{last} is damaged: " in capsys.readouterr().err
    torch.save({"somebody's": 1}, last)
    assert train(tmp_path, "--resume") == 1
    assert f"{last} is not of a run of fastcaps train" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_a_checkpoint_says_what_run_it_is_of(tmp_path, capsys):
    assert train(tmp_path, *SMALL, "--epochs", "1") == 0
    (tmp_path / "config.json").unlink()
    assert train(tmp_path, "--resume", "--loss", "focal") == 1
    assert "loss was 'margin' and is now 'focal'" in capsys.readouterr().err


def test_a_run_of_the_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CNN", lambda *shape: CNN(*shape, channels=(8,), units=(16,)))
    monkeypatch.setattr(module, "WATCH_STEPS", 1)
    options = ["--model", "cnn", "--epochs", "2", "--accelerator", "cpu", "--checkpoint-seconds", "4"]
    assert train(tmp_path / "one", *options) == 0
    assert "<h2>Reconstructions</h2>" not in (tmp_path / "one" / "report.html").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Keeper, "on_train_start", lambda self, *_: setattr(self, "interrupted", True))
        assert train(tmp_path / "two", *options) == 130  # after the first step
    steps = counted_steps(monkeypatch)
    assert train(tmp_path / "two", "--resume") == 0  # dropout goes on, too
    assert steps == list(range(1, 22))
    assert_same(tmp_path / "one", tmp_path / "two")
