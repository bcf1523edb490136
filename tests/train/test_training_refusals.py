"""What the trainer refuses, and with which words: settings, folders, launchers, disks, other runs."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.training_runs import SMALL, TINY, train

from fastcaps import cli
from fastcaps.train import callbacks, run
from fastcaps.train.run import check_devices
from fastcaps.train.samples import fingerprint, load_data
from fastcaps.train.settings import Settings, kind_of, option, read_settings

pytestmark = pytest.mark.train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "minst"], "did you mean 'mnist'?"),
        (["--loss", "margn"], "did you mean 'margin'?"),
        (["--epochs", "0"], "--epochs must be from 1 to 2147483647, got 0"),
        (["--lr", "-1"], "--lr must be positive"),
        (["--hidden-capsules", "8"], "must be like 64x8,32x16"),
        (["--batch-size", "5000"], "from 1 to 1438"),
        (["--batch-size", "10", "--accumulate", "3"], "multiple"),
        (["--devices", "4096"], "--devices 4096: this machine has"),
        (["--data", "mnist", "--root", "nowhere"], "missing: train-images-idx3-ubyte.gz"),
        (["--data", "image-folder", "--root", "nowhere"], "there is no folder"),
        (["--model", "cnn", "--loss", "margin"], "--model cnn is trained with --loss cross-entropy"),
        (["--model", "cnn", "--types", "4"], "--types is for --model capsnet"),
        (["--kernel-size", "9"], "too small"),
        (["--backend", "triton"], "triton"),
        (["--data", "multi-mnist", "--shift", "2"], "pairs are shifted already"),
        (["--image-size", "32"], "--image-size is for --data image-folder"),
        (["--data", "image-folder", "--image-size", "8x0"], "--image-size must be like 28 or 32x48, height x width"),
        (["--data", "image-folder", "--image-size", "3000000000x3"], "height x width, below 16384, got '3000000000x3'"),
        (
            ["--data", "image-folder", "--image-size", "1x2x3"],
            "height x width, below 16384, got '1x2x3'",
        ),
        (["--class-weights", "balancd"], "must be none, balanced, or a number for each class, as 1,1,2.5, got"),
        (["--class-weights", "1,-1"], "must be none, balanced, or a number for each class, as 1,1,2.5, got '1,-1'"),
        (["--class-weights", "1,2,3"], "--class-weights has 3 numbers, but there are 10 classes"),
        (["--sampling", "balance"], "did you mean 'balanced'?"),
        (["--model", "cnn", "--stem-stride", "2"], "--stem-stride is for --model capsnet"),
        (["--checkpoint-seconds", "-1"], "--checkpoint-seconds must not be negative"),
        (["--config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_settings_that_cannot_be(options, message, tmp_path, capsys):
    assert train(tmp_path / "run", *options, "--accelerator", "cpu") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_options_that_are_unknown(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--epoch", "3"])
    assert stop.value.code == 2
    assert "unknown argument --epoch; did you mean '--epochs'?" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1, 2]", "{", '{"epoch": 3}', "\xff"])
def test_configurations_that_cannot_be(content, tmp_path, capsys):
    (tmp_path / "own.json").write_bytes(content.encode("latin-1"))
    assert train(tmp_path / "run", "--config", str(tmp_path / "own.json")) == 1
    assert str(tmp_path / "own.json") in capsys.readouterr().err


def test_values_of_a_configuration_are_checked_in_its_name_and_combinations_with_the_options(tmp_path):
    file = tmp_path / "own.json"
    file.write_text('{"model": "cnn", "loss": "margin"}')
    assert read_settings(file, {"loss": "cross-entropy"}) == {"model": "cnn", "loss": "cross-entropy"}
    file.write_text('{"epochs": 0}')
    with pytest.raises(ValueError, match=r"own\.json: --epochs must be from 1"):
        read_settings(file, {"epochs": 3})


@pytest.mark.usefixtures("no_figures")
def test_a_folder_that_holds_a_run(whole, tmp_path, capsys):
    assert train(whole, *SMALL) == 1
    assert "--resume goes on, --overwrite begins anew" in capsys.readouterr().err
    assert train(tmp_path / "run", *SMALL, "--epochs", "1") == 0
    (tmp_path / "run" / "mine.txt").write_text("kept")
    for wrong in (("--batch-size", "9999"), ("--kernel-size", "9")):
        assert train(tmp_path / "run", *SMALL, "--epochs", "1", "--overwrite", *wrong) == 1
        assert (tmp_path / "run" / "model.safetensors").exists()  # it is sure to begin before anything is deleted
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "--overwrite", "--resume")
    assert train(tmp_path / "run", *SMALL, "--epochs", "1", "--overwrite") == 0
    assert (tmp_path / "run" / "mine.txt").read_text() == "kept"
    assert len(list((tmp_path / "run" / "log").iterdir())) == 1


def test_a_resumed_run_must_be_the_same(whole, colours, capsys):
    before = (whole / "model.safetensors").read_bytes()
    assert train(whole, "--resume", "--types", "3", "--seed", "1") == 1
    assert "types was 2 and is now 3; seed was 0 and is now 1" in capsys.readouterr().err
    assert train(whole, "--resume", "--data", "image-folder", "--root", str(colours)) == 1
    err = capsys.readouterr().err
    assert "data was 'digits' and is now 'image-folder'" in err
    assert "classes was 10 and is now 2" in err
    assert (whole / "model.safetensors").read_bytes() == before


def test_a_changed_image_changes_the_fingerprint(colours):
    from PIL import Image

    settings = Settings(data="image-folder", root=str(colours))
    for part in ("train", "test"):
        before = fingerprint(load_data(settings))
        Image.new("RGB", (20, 18), (201, 30, 30)).save(colours / part / "red" / "0.png")
        after = fingerprint(load_data(settings))
        assert {name for name in before if before[name] != after[name]} == {"sha256"}
        assert after["class names"] == ["blue", "red"]


@pytest.mark.usefixtures("no_figures")
def test_names_of_classes_are_kept(colours, tmp_path, capsys):
    options = [*TINY, "--data", "image-folder", "--root", str(colours)]
    model = str(tmp_path / "run" / "model.safetensors")
    assert train(tmp_path / "run", *options) == 0
    picture = str(colours / "test" / "red" / "0.png")
    assert cli.main(["show", model, picture, "--out", str(tmp_path / "show.html")]) == 0
    assert re.search(r"0\.png: (no class is present, .*: )?(red|blue) \(", capsys.readouterr().out)
    for part in ("train", "test"):
        (colours / part / "red").rename(colours / part / "green")
    assert cli.main(["evaluate", model]) == 1
    assert "knows the classes blue, red, not blue, green" in capsys.readouterr().err


def test_a_disk_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "run", *SMALL) == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_closed(tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert train(tmp_path / "closed" / "run", *SMALL) == 1
    assert "ermission denied" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_the_old_run(tmp_path, monkeypatch, capsys, number):
    def failing(self, *arguments, **named):
        raise OSError(number, os.strerror(number), str(self))

    (tmp_path / "last.ckpt").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        assert train(tmp_path, *SMALL, "--overwrite") == 1
        patch.setattr(Path, "mkdir", failing)
        assert train(tmp_path / "new", *SMALL) == 1
    assert capsys.readouterr().err.count(os.strerror(number)) == 2
    assert (tmp_path / "last.ckpt").read_bytes() == b"old"
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_figures")
def test_signals_mean_afterwards_what_they_meant_before(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train(tmp_path, *SMALL, "--epochs", "1") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


WORDS = {"hidden_capsules": "8x4", "image_size": "8x4", "class_weights": "1,2"}  # texts of which not any will do


def test_every_setting_is_an_option(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(run, "train", lambda options, *_, **__: given.append(options))
    values = {"str": "text", "int": "3", "float": "0.5"}
    for field in dataclasses.fields(Settings):
        value = next(iter(field.metadata["choices"] or [WORDS.get(field.name)]))
        kind = kind_of(field)
        arguments = [option(field.name)] + ([] if kind is bool else [value or values[kind.__name__]])
        arguments += ["--data", "image-folder"] if field.name == "image_size" else []
        assert train(tmp_path, *arguments) == 0
        others = {"data"} if field.name == "image_size" else set()
        assert given.pop().keys() - others == {field.name}


@pytest.mark.parametrize(
    "given",
    [
        {"flip": "no"}, {"compile": 1}, {"lr": True}, {"lr": "fast"}, {"lr": None}, {"reconstruction": "a"},
        {"root": 5}, {"data": 5}, {"data": None}, {"precision": 32}, {"backend": 7}, {"hidden_capsules": None},
        {"batch_size": None}, {"epochs": 2.5}, {"seed": 2**70}, {"schedule": None}, {"lr": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_the_wrong_kind(given):
    (name,) = given
    with pytest.raises(ValueError, match=option(name)):
        Settings(**given)
    assert Settings(lr=1).lr == 1.0


def test_nodes_need_somebody_who_knows_them(tmp_path, capsys):
    assert train(tmp_path / "run", "--nodes", "2") == 1
    assert "needs torchrun or SLURM" in capsys.readouterr().err


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "training"}


def test_who_started_the_processes_knows_how_many_they_are(monkeypatch):
    for name in (*SLURM, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)
    assert check_devices(Settings(accelerator="cpu")) == (1, 1)
    for environment, found in ((SLURM, (1, 2)), (SLURM | TORCHRUN, (2, 3))):  # torchrun may run under SLURM
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        assert check_devices(Settings(accelerator="cpu")) == found
        assert check_devices(Settings(accelerator="cpu", devices=found[0], nodes=found[1])) == found
        with pytest.raises(ValueError, match=r"--nodes 7: (SLURM|torchrun) has started"):
            check_devices(Settings(accelerator="cpu", nodes=7))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ValueError, match="it needs --nodes and --ntasks-per-node"):
        check_devices(Settings(accelerator="cpu"))


def test_all_processes_need_the_same_folder_and_settings(whole, tmp_path):
    config = json.loads((whole / "config.json").read_text())
    trainer = SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=lambda decision: decision))
    callbacks.Keeper(whole, 60, config).setup(trainer, None, "fit")
    for out, told in ((tmp_path, config), (whole, config | {"version": "another"})):
        with pytest.raises(ValueError, match="the same for all processes"):
            callbacks.Keeper(out, 60, told).setup(trainer, None, "fit")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), RuntimeError("DefaultCPUAllocator: can't allocate")],
)
def test_too_little_memory(tmp_path, monkeypatch, capsys, error):
    def build(*arguments):
        raise error

    monkeypatch.setattr(run, "build_network", build)
    assert train(tmp_path / "run") == 1
    assert f"fastcaps train: {str(error).splitlines()[0]} (" in capsys.readouterr().err


def test_ctrl_c_before_there_is_a_run(tmp_path, monkeypatch, capsys):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load_data", interrupted)
    assert train(tmp_path / "run") == 130
    assert capsys.readouterr().err == "fastcaps train: stopped\n"


def test_evaluation_on_fewer_classes_than_the_network_knows(whole, tmp_path, capsys):
    from PIL import Image

    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / part / name / "0.png")
    command = ["evaluate", str(whole / "model.safetensors"), "--data", "image-folder", "--root", str(tmp_path)]
    assert cli.main(command) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:12]] == ["a", "b", *"23456789"]


def test_a_report_without_a_log(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("fastcaps.train.report.network_sections", lambda *_: [])  # they are slow, and know no log
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "log")
    assert train(tmp_path / "run", "--resume") == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Summary</h2>" in page
    assert "<h2>Curves</h2>" not in page


def test_evaluation_by_a_named_backend(whole, capsys):
    command = ["evaluate", str(whole / "model.safetensors"), "--backend"]
    assert cli.main([*command, "reference"]) == 0
    if not torch.cuda.is_available():
        capsys.readouterr()
        assert cli.main([*command, "triton"]) == 1
        assert "triton" in capsys.readouterr().err
