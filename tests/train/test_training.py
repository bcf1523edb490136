"""What a training run leaves, and the data it takes."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.image_files import MNIST, idx
from support.training_runs import TINY, assert_same, course, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastcaps import cli
from fastcaps.data import mnist
from fastcaps.models.network import Network, describe
from fastcaps.train.settings import Settings, read_settings

pytestmark = pytest.mark.train

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
    never = [line for line in out.splitlines() if line.startswith("never predicted: ")]
    assert len(out.splitlines()) - len(never) == 12
    assert len(never) <= 1


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


@pytest.mark.usefixtures("no_figures")
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


def test_a_log_that_was_cut(whole, tmp_path):
    folder = tmp_path / "log" / "version_0"
    folder.mkdir(parents=True)
    content = (whole / "log" / "version_0" / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(content[:-7])
    assert course(tmp_path) == course(whole)[:-1]
    (folder / "metrics.csv").write_text(content + "nonsense,1\n")
    assert course(tmp_path) == course(whole)


# ----------------------------------------------------------------------------------------------------------- other data


@pytest.fixture
def little_mnist(tmp_path) -> Path:
    """Forty images for training and ten for testing."""
    if not MNIST.exists():
        pytest.skip("real MNIST is not here")
    data = mnist(MNIST)
    root = tmp_path / "mnist"
    root.mkdir()
    for name, images, labels in (("train", *data.tensors[:2]), ("t10k", *data.tensors[2:])):
        count = 40 if name == "train" else 10
        (root / f"{name}-images-idx3-ubyte").write_bytes(idx((images[:count, 0] * 255).round().to(torch.uint8)))
        (root / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels[:count].to(torch.uint8)))
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


@pytest.mark.usefixtures("no_figures")
def test_images_of_a_folder_are_scaled(colours, tmp_path, capsys):
    from PIL import Image

    options = ["--data", "image-folder", "--root", str(colours)]
    Image.new("RGB", (9, 30), (200, 30, 30)).save(colours / "train" / "red" / "0.png")
    assert train(tmp_path / "run", *TINY, *options) == 1
    assert "or be scaled to one (size=, --image-size)" in capsys.readouterr().err
    assert train(tmp_path / "run", *TINY, *options, "--image-size", "1x40", "--stem-stride", "2") == 0  # as signals
    model = tmp_path / "run" / "model.safetensors"
    network = Network.load(model)
    assert network.image_shape == (3, 1, 40)
    assert (network.config["kernel_size"], network.config["stem_stride"]) == ([1, 9], 2)
    capsys.readouterr()
    for part in ("train", "test"):
        for name in ("red", "blue"):
            Image.new("RGB", (13, 7), (200, 30, 30)).save(colours / part / name / "0.png")
    assert cli.main(["evaluate", str(model)]) == 0  # whatever their size is
    _, _, *classes = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in classes[:2]] == [["blue", "4"], ["red", "4"]]  # all images
    small = Settings(data="image-folder", image_size="8").resolved((1, 8, 8))
    assert (small.kernel_size, small.primary_stride) == (3, 1)


def test_colour_images_and_stacked_capsules(colours, tmp_path):
    options = ["--data", "image-folder", "--root", str(colours), "--hidden-capsules", "8x4,6x4", "--primary-dim", "4"]
    assert train(tmp_path / "run", *TINY, *options) == 0
    network = Network.load(tmp_path / "run" / "model.safetensors")
    assert [(layer.out_capsules, layer.out_dim) for layer in network.hidden] == [(8, 4), (6, 4)]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["flip"], settings["shift"]) == (True, 1)
    assert "0: blue, 1: red" in (tmp_path / "run" / "report.html").read_text()
