import errno
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.training_runs import SMALL, TINY, assert_same, course, train, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastcaps import CapsNet, cli
from fastcaps.losses import margin_loss, spread_loss
from fastcaps.models import CNN
from fastcaps.models.network import Network, describe
from fastcaps.train import callbacks
from fastcaps.train import run as training
from fastcaps.train.evaluation import classification_loss, network_loss, routing_statistics, wrong_of
from fastcaps.train.report import confusion_counts
from fastcaps.train.run import build_network
from fastcaps.train.samples import Samples, image_shape, load_data
from fastcaps.train.settings import Settings, read_settings

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"
SUPPORT = Path(__file__).parents[1] / "support"


def counted_steps(monkeypatch) -> list[int]:
    """The steps that the optimizer makes from now on, one by one."""
    steps, original = [], training.Training.on_before_optimizer_step

    def hook(self, optimizer):
        steps.append(self.global_step)
        original(self, optimizer)

    monkeypatch.setattr(training.Training, "on_before_optimizer_step", hook)
    return steps


# ---------------------------------------------------------------------------------------------------- what a run leaves


def test_what_a_run_leaves(whole, capsys):
    assert sorted(path.name for path in whole.iterdir()) == [
        "best.safetensors", "config.json", "last.ckpt", "log", "model.safetensors", "report.html", "tensorboard",
    ]  # fmt: skip
    config = json.loads((whole / "config.json").read_text())
    assert config["settings"]["kernel_size"] == 3
    assert config["settings"]["loss"] == "margin"
    assert describe(whole / "model.safetensors")["run"] == config
    rows = course(whole)
    assert [row["epoch"] for row in rows if "epoch" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "train_loss" in row] == [0, 10, 20, 30]
    lr = [row["lr"] for row in rows if "lr" in row]
    assert lr[0] == pytest.approx(1e-3)
    assert lr == sorted(lr, reverse=True)
    assert lr[-1] < 0.05e-3
    routing = next(row for row in rows if "routing/dead" in row)
    assert {f"routing/{name}_{t}" for name in ("entropy", "agreement", "change") for t in (1, 2, 3)} < routing.keys()
    board = EventAccumulator(str(whole / "tensorboard")).Reload().Tags()
    assert set(board["images"]) == {"reconstructions", "coupling"}
    assert {"train_loss", "test_error", "routing/dead"} < set(board["scalars"])
    errors = [row["test_error"] for row in rows if "test_error" in row]
    assert describe(whole / "best.safetensors")["run"] == config | {"test_error": min(errors)}

    capsys.readouterr()
    assert cli.main(["evaluate", str(whole / "model.safetensors")]) == 0
    out = capsys.readouterr().out
    assert f"test error {errors[-1]:.2f} %" in out
    assert len(out.splitlines()) == 12


def test_the_report_is_whole_and_needs_nothing(whole):
    page = (whole / "report.html").read_text()
    for heading in (
        "Summary", "Curves", "Routing over training", "Confusion", "Taken for something else", "Reconstructions",
        "Coupling, iteration by iteration", "Perturbations", "Settings",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    pictures = re.findall(r'src="(.{22})', page)
    assert len(pictures) >= 9
    assert set(pictures) == {"data:image/png;base64,"}
    assert not re.search(r"https?://|<script|<link|@import|url\(", re.sub(r'"data:[^"]*"', "", page))


def test_show_draws_images_of_ones_own(whole, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (40, 30), "white").save(tmp_path / "mine.png")
    page = tmp_path / "show.html"
    assert cli.main(["show", str(whole / "model.safetensors"), str(tmp_path / "mine.png"), "--out", str(page)]) == 0
    assert "mine.png: " in capsys.readouterr().out
    assert "<h2>mine.png: Perturbations</h2>" in page.read_text()
    assert cli.main(["show", str(whole / "model.safetensors"), str(page), "--out", str(page)]) == 1
    assert "is not an image" in capsys.readouterr().err
    assert cli.main(["show", str(tmp_path / "none"), str(page)]) == 1


@pytest.mark.usefixtures("no_report")
def test_a_configuration_is_taken_back(whole, tmp_path):
    assert train(tmp_path / "again", "--config", str(whole / "config.json")) == 0
    assert_same(whole, tmp_path / "again")
    (tmp_path / "own.json").write_text('{"types": 3, "epochs": 1}')
    assert read_settings(tmp_path / "own.json", {"epochs": 2}) == {"types": 3, "epochs": 2}


def test_another_model_or_data_set_than_the_configuration_s(whole):
    same = read_settings(whole / "config.json", {"data": "digits", "model": "capsnet", "shift": 1})
    assert Settings(**same).resolved((1, 8, 8)) == Settings(**same)
    assert (same["shift"], same["types"]) == (1, 2)
    baseline = Settings(**read_settings(whole / "config.json", {"model": "cnn"})).resolved((1, 8, 8))
    assert (baseline.loss, baseline.reconstruction, baseline.schedule) == ("cross-entropy", 0.0, "cosine")
    larger = Settings(**read_settings(whole / "config.json", {"data": "cifar10"})).resolved((3, 32, 32))
    assert (larger.kernel_size, larger.shift, larger.flip, larger.types) == (9, 2, True, 2)


# --------------------------------------------------------------------------------------------------------- nothing lost


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
@pytest.mark.usefixtures("no_report")
def test_a_stopped_run_goes_on_as_if_nothing_had_been(whole, tmp_path, monkeypatch, moment, at, status, kept):
    command = [sys.executable, SUPPORT / "interrupted.py", moment, str(at), *SMALL, "--out", tmp_path / "run"]
    stopped = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert stopped.returncode == status, stopped.stderr
    if status == 130:
        assert f"to go on: fastcaps train --resume --out {tmp_path / 'run'}" in stopped.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()
    steps = counted_steps(monkeypatch)
    assert train(tmp_path / "run", "--resume") == 0
    assert len(steps) == 33 - kept
    assert_same(whole, tmp_path / "run")
    assert course(tmp_path / "run") == course(whole)
    best = [load_file(out / "best.safetensors") for out in (whole, tmp_path / "run")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.usefixtures("no_report")
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


@pytest.mark.usefixtures("no_report")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capsys):
    assert train(tmp_path / "run", *SMALL, "--epochs", "1", "--schedule", "constant") == 0
    before = (tmp_path / "run" / "last.ckpt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # a write beyond it fails
    try:
        assert train(tmp_path / "run", "--resume", "--epochs", "2") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in capsys.readouterr().err
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.partial"))
    assert train(tmp_path / "run", "--resume") == 0


@pytest.mark.usefixtures("no_report")
def test_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    assert train(tmp_path, *SMALL, "--epochs", "1", "--schedule", "constant") == 0
    last = tmp_path / "last.ckpt"
    content = last.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:1000] + b"x" * 1000 + content[2000:]):
        last.write_bytes(damaged)
        assert train(tmp_path, "--resume", "--epochs", "2") == 1
        assert f"{last} is not a whole checkpoint" in capsys.readouterr().err
    torch.save({"somebody's": 1}, last)
    assert train(tmp_path, "--resume") == 1
    assert f"{last} is not of a run of fastcaps train" in capsys.readouterr().err


@pytest.mark.usefixtures("no_report")
def test_a_checkpoint_says_what_run_it_is_of(tmp_path, capsys):
    assert train(tmp_path, *SMALL, "--epochs", "1") == 0
    (tmp_path / "config.json").unlink()
    assert train(tmp_path, "--resume", "--loss", "focal") == 1
    assert "loss was 'margin' and is now 'focal'" in capsys.readouterr().err


def test_a_log_that_was_cut(whole, tmp_path):
    folder = tmp_path / "log" / "version_0"
    folder.mkdir(parents=True)
    content = (whole / "log" / "version_0" / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(content[:-7])
    assert course(tmp_path) == course(whole)[:-1]
    (folder / "metrics.csv").write_text(content + "nonsense,1\n")
    assert course(tmp_path) == course(whole)


@pytest.mark.usefixtures("no_report")
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, capsys):
    assert train(tmp_path, *SMALL, "--lr", "1e36", "--checkpoint-seconds", "0", "--reconstruction", "0") == 1
    err = capsys.readouterr().err
    assert re.search(r"step \d+, epoch \d: the (loss|norm of the gradient) is (nan|inf)", err)
    assert "routing: dead" in err
    assert f"last good checkpoint: {tmp_path / 'last.ckpt'}" in err
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(x.isfinite().all() for x in state.values())


# ---------------------------------------------------------------------------------------------------- several processes


def run(*command: str, status: int = 0) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=280, cwd=SUPPORT.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == status, done.stderr


def as_srun_would(command: list[str]) -> None:
    """Two processes that SLURM's variables tell of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "training", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}
    told |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    processes = [
        subprocess.Popen(command, env=told | {"SLURM_PROCID": n, "SLURM_LOCALID": n}, stderr=subprocess.PIPE, text=True)
        for n in ("0", "1")
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU core")
@pytest.mark.usefixtures("no_report")
def test_two_processes_are_one(tmp_path):
    options = [*SMALL, "--epochs", "2", "--precision", "64", "--schedule", "constant"]  # 22 steps
    assert train(tmp_path / "one", *options) == 0
    run("fastcaps.cli", "train", *options, "--devices", "2", "--out", str(tmp_path / "two"))
    assert_same(tmp_path / "one", tmp_path / "two", 1e-9)
    as_srun_would([sys.executable, "-m", "fastcaps.cli", "train", *options, "--out", str(tmp_path / "slurm")])
    assert_same(tmp_path / "one", tmp_path / "slurm", 1e-9)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    half = tmp_path / "torchrun"
    stopped = (*torchrun[:-1], str(SUPPORT / "interrupted.py"), "SIGTERM@1", "15")  # a signal to the second alone
    run(*stopped, *options, "--accumulate", "2", "--out", str(half), status=1)
    assert torch.load(half / "last.ckpt", weights_only=True)["global_step"] == 16
    run(*torchrun, "fastcaps.cli", "train", "--resume", "--out", str(half))
    assert_same(tmp_path / "one", half, 1e-9)
    errors = [[row["test_error"] for row in course(out) if "test_error" in row] for out in (tmp_path / "one", half)]
    assert len(errors[0]) == 2
    assert errors[0] == errors[1]


@pytest.mark.usefixtures("no_report")
def test_parts_of_a_batch_add_up(tmp_path):
    options = [*SMALL, "--epochs", "1", "--precision", "64"]
    assert train(tmp_path / "whole", *options) == 0
    assert train(tmp_path / "parts", *options, "--accumulate", "4") == 0
    assert_same(tmp_path / "whole", tmp_path / "parts", 1e-9)


@pytest.mark.usefixtures("no_report")
def test_half_precision_and_compilation(tmp_path, monkeypatch, capsys):
    options, dtypes, compiled = [*SMALL, "--epochs", "1"], set(), []
    poses, compile_ = CapsNet.class_poses, torch.compile

    def seen(self, images):
        out = poses(self, images)
        dtypes.add(out.dtype)
        return out

    def counted(function, **options):
        compiled.append((function.__name__, options))
        return compile_(function, **options)

    with monkeypatch.context() as patch:
        patch.setattr(CapsNet, "class_poses", seen)
        assert train(tmp_path / "half", *options, "--precision", "bf16-mixed") == 0
    assert dtypes == {torch.bfloat16, torch.float32}
    tested = [row["test_error"] for row in course(tmp_path / "half") if "test_error" in row]
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "half" / "model.safetensors")]) == 0  # both in float32
    assert f"test error {tested[-1]:.2f} %" in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", counted)
    assert weights(tmp_path / "half")["stem.weight"].dtype == torch.float32
    assert train(tmp_path / "compiled", *options, "--compile") == 0
    assert compiled == [("network_loss", {"fullgraph": True})]
    assert train(tmp_path / "eager", *options) == 0
    half, eager = (
        [row["train_loss"] for row in course(tmp_path / name) if "train_loss" in row] for name in ("half", "eager")
    )
    assert half == pytest.approx(eager, rel=0.02)
    assert_same(tmp_path / "compiled", tmp_path / "eager", 1e-4)


# ----------------------------------------------------------------------------------------------------- what is computed


def curve(backend: str, dtype: torch.dtype, change: float = 0.0) -> torch.Tensor:
    """The losses of 100 steps."""
    settings = Settings(stem=16, types=4, backend=backend)
    data = load_data(settings)
    settings = settings.resolved(image_shape(data))
    samples = Samples(data, settings)
    network = build_network(settings, image_shape(data), 10).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + change)
    optimizer = torch.optim.Adam(network.parameters())
    losses = []
    for step in range(100):
        index = torch.arange(step * 32, step * 32 + 32) % 1438
        images, labels, targets = samples.train(index, step)
        loss, _ = network_loss(network, settings, images.to(dtype), labels, targets.to(dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double()


def test_backends_train_alike():
    reference, native = curve("reference", torch.float64), curve("native", torch.float64)
    assert reference[-1] < 0.8 * reference[0]
    assert (reference - native).abs().max() <= 1e-9
    reference, native = curve("reference", torch.float32), curve("native", torch.float32)
    ulp = curve("reference", torch.float32, torch.finfo(torch.float32).eps)
    assert (reference - native).abs().max() <= 10 * (reference - ulp).abs().max()


def test_losses_by_name():
    scores = torch.rand(5, 4)
    labels = torch.tensor([[0], [1], [2], [3], [0]])
    assert classification_loss("margin", scores, labels) == margin_loss(scores, labels[:, 0])
    assert classification_loss("spread", scores, labels) == spread_loss(scores, labels[:, 0])
    expected = torch.nn.functional.cross_entropy(10 * scores, labels[:, 0])
    torch.testing.assert_close(classification_loss("cross-entropy", scores, labels), expected)
    pairs = torch.tensor([[0, 1]])
    both = margin_loss(scores[:1], torch.tensor([[True, True, False, False]]))
    assert classification_loss("margin", scores[:1], pairs) == both
    assert classification_loss("focal", scores, labels) < classification_loss("margin", scores, labels)


def test_wrong_and_confused():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.2, 0.1], [0.3, 0.2, 0.8]])
    assert wrong_of(scores, torch.tensor([[1], [1], [2]])).tolist() == [False, True, False]
    assert confusion_counts(scores, torch.tensor([[1], [1], [2]])).tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 1]]
    pairs = torch.tensor([[2, 1], [2, 1], [0, 2]])
    assert wrong_of(scores, pairs).tolist() == [False, True, False]
    assert confusion_counts(scores, pairs).tolist() == [[1, 0, 0], [0, 2, 0], [1, 0, 2]]


def test_routing_statistics():
    network = CapsNet((1, 8, 8), 4, stem_channels=4, kernel_size=3, types=2, hidden_capsules=[(6, 4)])
    images = torch.rand(5, 1, 8, 8)
    numbers = routing_statistics(network, images)
    trace = network.capsules.trace(network.hidden(network.primary_poses(images)))
    assert numbers["entropy_1"] == pytest.approx(1)
    assert numbers["change_1"] == pytest.approx(trace.change[0].mean().item())
    assert numbers["agreement_2"] == pytest.approx((trace.coupling[1] * trace.agreement[1]).sum(-1).mean().item())
    with torch.no_grad():
        network.capsules.weight *= 1e6
        network.capsules.weight[:, 1:] = 0
    numbers = routing_statistics(network, images)
    assert numbers["dead"] == 0.75
    assert numbers["entropy_3"] < 0.1


def test_the_baseline(tmp_path, capsys):
    small = CNN((1, 8, 8), 3, channels=(4, 5), units=(6,))
    small.save(tmp_path / "cnn.safetensors")
    again = Network.load(tmp_path / "cnn.safetensors").eval()
    assert isinstance(again, CNN)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(again.predict(images), small.eval().predict(images))
    with pytest.raises(ValueError, match=r"holds a fastcaps.CNN, not a CapsNet"):
        CapsNet.load(tmp_path / "cnn.safetensors")
    with pytest.raises(ValueError, match=r"\[B, 1, 8, 8\]"):
        small(torch.rand(2, 1, 8, 9))


def test_a_run_of_the_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CNN", lambda *shape: CNN(*shape, channels=(8,), units=(16,)))
    monkeypatch.setattr(training, "WATCH_STEPS", 1)
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


# ----------------------------------------------------------------------------------------------------------- other data


def write_idx(path: Path, values: torch.Tensor) -> None:
    head = struct.pack(f">4B{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    path.write_bytes(head + bytes(values.flatten().tolist()))


@pytest.fixture
def little_mnist(tmp_path) -> Path:
    """Forty images for training and ten for testing."""
    if not MNIST.exists():
        pytest.skip("real MNIST is not here")
    from fastcaps.data import mnist

    data = mnist(MNIST)
    root = tmp_path / "mnist"
    root.mkdir()
    for name, images, labels in (("train", *data[:2]), ("t10k", *data[2:4])):
        count = 40 if name == "train" else 10
        write_idx(root / f"{name}-images-idx3-ubyte", (images[:count, 0] * 255).round().to(torch.uint8))
        write_idx(root / f"{name}-labels-idx1-ubyte", labels[:count].to(torch.uint8))
    return root


@pytest.mark.parametrize(
    "options", [["--data", "mnist", "--loss", "spread"], ["--data", "multi-mnist", "--loss", "focal"]]
)
def test_real_digits_and_pairs_of_them(little_mnist, tmp_path, options, capsys):
    out = tmp_path / "run"
    assert train(out, *TINY, "--root", str(little_mnist), *options) == 0
    assert "Taken for something else" in (out / "report.html").read_text()
    capsys.readouterr()
    assert cli.main(["evaluate", str(out / "model.safetensors"), "--root", str(little_mnist)]) == 0
    assert "test error" in capsys.readouterr().out
    assert cli.main(["evaluate", str(out / "model.safetensors"), "--data", "digits"]) == 1
    assert "takes images" in capsys.readouterr().err


def test_colour_images_and_stacked_capsules(colours, tmp_path):
    options = ["--data", "image-folder", "--root", str(colours), "--hidden-capsules", "8x4,6x4", "--primary-dim", "4"]
    assert train(tmp_path / "run", *TINY, *options) == 0
    network = Network.load(tmp_path / "run" / "model.safetensors")
    assert [(layer.out_capsules, layer.out_dim) for layer in network.hidden] == [(8, 4), (6, 4)]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["flip"], settings["shift"]) == (True, 1)
    assert "0: blue, 1: red" in (tmp_path / "run" / "report.html").read_text()
