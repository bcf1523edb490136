import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastcaps import CapsNet, callbacks, cli, training
from fastcaps.evaluation import classification_loss, network_loss, routing_statistics, wrong_of
from fastcaps.losses import margin_loss, spread_loss
from fastcaps.models import CNN
from fastcaps.network import Network, describe
from fastcaps.report import confusion_counts, read_log
from fastcaps.samples import Samples, fingerprint, image_shape, load_data
from fastcaps.settings import Settings, kind_of, option, read_settings
from fastcaps.training import build_network, check_devices

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
TESTS = Path(__file__).parent
# A small network on 1,438 digits: 11 steps an epoch.
SMALL = ["--stem", "8", "--types", "2", "--capsule-dim", "4", "--epochs", "3", "--accelerator", "cpu"]
SMALL += ["--checkpoint-seconds", "4", "--schedule", "cosine"]


def train(out: Path, *options: str) -> int:
    return cli.main(["train", "--out", str(out), *options])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_same(one: Path, other: Path, tolerance: float = 0) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


def course(out: Path) -> list[dict[str, float]]:
    return [{name: x for name, x in row.items() if name != "images/s"} for row in read_log(out)]


def counted_steps(monkeypatch) -> list[int]:
    """The steps that the optimizer makes from now on, one by one."""
    steps, original = [], training.Training.on_before_optimizer_step

    def hook(self, optimizer):
        steps.append(self.global_step)
        original(self, optimizer)

    monkeypatch.setattr(training.Training, "on_before_optimizer_step", hook)
    return steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(out, *SMALL) == 0
    return out


@pytest.fixture
def no_report(monkeypatch) -> None:
    """A run without its slowest part."""
    monkeypatch.setattr(training, "write_report", lambda out: None)


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
    command = [sys.executable, TESTS / "interrupted.py", moment, str(at), *SMALL, "--out", tmp_path / "run"]
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
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=280, cwd=TESTS.parent,
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
    stopped = (*torchrun[:-1], str(TESTS / "interrupted.py"), "SIGTERM@1", "15")  # a signal to the second alone
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


TINY = ["--stem", "4", "--types", "1", "--capsule-dim", "4", "--epochs", "1", "--accelerator", "cpu"]
TINY += ["--batch-size", "20"]


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


@pytest.fixture
def colours(tmp_path) -> Path:
    from PIL import Image

    for part, count in (("train", 12), ("test", 4)):
        for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (20, 18), colour).save(tmp_path / "images" / part / name / f"{n}.png")
    return tmp_path / "images"


def test_colour_images_and_stacked_capsules(colours, tmp_path):
    options = ["--data", "image-folder", "--root", str(colours), "--hidden-capsules", "8x4,6x4", "--primary-dim", "4"]
    assert train(tmp_path / "run", *TINY, *options) == 0
    network = Network.load(tmp_path / "run" / "model.safetensors")
    assert [(layer.out_capsules, layer.out_dim) for layer in network.hidden] == [(8, 4), (6, 4)]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["flip"], settings["shift"]) == (True, 1)
    assert "0: blue, 1: red" in (tmp_path / "run" / "report.html").read_text()


# ------------------------------------------------------------------------------------------------------------ bad input


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


@pytest.mark.usefixtures("no_report")
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


@pytest.mark.usefixtures("no_report")
def test_names_of_classes_are_kept(colours, tmp_path, capsys):
    options = [*TINY, "--data", "image-folder", "--root", str(colours)]
    model = str(tmp_path / "run" / "model.safetensors")
    assert train(tmp_path / "run", *options) == 0
    picture = str(colours / "test" / "red" / "0.png")
    assert cli.main(["show", model, picture, "--out", str(tmp_path / "show.html")]) == 0
    assert re.search(r"0\.png: (red|blue) \(", capsys.readouterr().out)
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


@pytest.mark.usefixtures("no_report")
def test_signals_mean_afterwards_what_they_meant_before(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train(tmp_path, *SMALL, "--epochs", "1") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_every_setting_is_an_option(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(training, "train", lambda options, *_, **__: given.append(options))
    values = {"str": "text", "int": "3", "float": "0.5"}
    for field in dataclasses.fields(Settings):
        value = next(iter(field.metadata["choices"] or ["8x4" if field.name == "hidden_capsules" else None]))
        kind = kind_of(field)
        arguments = [option(field.name)] + ([] if kind is bool else [value or values[kind.__name__]])
        assert train(tmp_path, *arguments) == 0
        assert list(given.pop()) == [field.name]


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
    [torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), RuntimeError("can't allocate memory: you tried")],
)
def test_too_little_memory(tmp_path, monkeypatch, capsys, error):
    def build(*arguments):
        raise error

    monkeypatch.setattr(training, "build_network", build)
    assert train(tmp_path / "run") == 1
    assert f"fastcaps train: {str(error).splitlines()[0]} (" in capsys.readouterr().err


def test_ctrl_c_before_there_is_a_run(tmp_path, monkeypatch, capsys):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "load_data", interrupted)
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
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["a", "b", *"23456789"]


def test_a_report_without_a_log(whole, tmp_path):
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
