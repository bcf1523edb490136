"""Runs, files and names of version 0.1."""

import importlib
import json
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.training_runs import SMALL, assert_same, train

from fastcaps import CapsNet, cli
from fastcaps.data import Dataset, digits
from fastcaps.models.network import METADATA
from fastcaps.train import run
from fastcaps.train.settings import Settings, known_settings, read_settings

pytestmark = pytest.mark.train


def of_0_1(config: dict) -> dict:
    """What 0.1 wrote for the same run."""
    settings = {name: value for name, value in config["settings"].items() if name != "bias"}
    return config | {"version": "0.1.0", "settings": {"iterations": settings.pop("num_iterations")} | settings}


@pytest.mark.usefixtures("no_figures")
def test_a_run_of_0_1_goes_on(tmp_path_factory, tmp_path):
    whole, options = tmp_path_factory.mktemp("whole"), [*SMALL, "--no-bias"]  # 0.1 knew no bias
    assert train(whole, *options) == 0
    assert "capsules.bias" not in load_file(whole / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Keeper, "on_train_start", lambda self, *_: setattr(self, "interrupted", True))
        assert train(tmp_path, *options) == 130  # after the first step
    config = of_0_1(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.save(checkpoint | {"fastcaps": config}, tmp_path / "last.ckpt")
    assert train(tmp_path, "--resume") == 0
    assert_same(whole, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == json.loads((whole / "config.json").read_text())


def test_a_configuration_and_a_model_of_0_1(whole, tmp_path, capsys):
    config = of_0_1(json.loads((whole / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_settings(tmp_path / "config.json", {}) == read_settings(whole / "config.json", {}) | {"bias": False}
    assert "bias" not in read_settings(tmp_path / "config.json", {"model": "cnn"})  # a baseline has none
    assert "capsules.bias" in load_file(whole / "model.safetensors")
    (tmp_path / "own.json").write_text('{"iterations": 2}')
    assert read_settings(tmp_path / "own.json", {}) == {"num_iterations": 2}
    with safe_open(whole / "model.safetensors", "pt") as file:
        described = json.loads(file.metadata()[METADATA])
    model = tmp_path / "model.safetensors"
    save_file(load_file(whole / "model.safetensors"), model, {METADATA: json.dumps(described | {"run": config})})
    outputs = []
    for path in (whole / "model.safetensors", model):
        assert cli.main(["evaluate", str(path)]) == 0
        outputs.append(capsys.readouterr())
    assert outputs[0] == outputs[1]


def test_the_option_of_0_1(tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(run, "train", lambda options, *_, **__: given.append(options))
    assert train(tmp_path, "--iterations", "2") == 0
    assert given == [{"num_iterations": 2}]
    assert "--iterations is now --num-iterations" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "--iterations" not in capsys.readouterr().out.replace("--num-iterations", "")


def test_settings_by_their_name_of_0_1():
    with pytest.warns(DeprecationWarning, match="iterations= is now num_iterations="):
        assert Settings(iterations=2) == Settings(num_iterations=2)
    assert known_settings({"iterations": 2}, "a file") == {"num_iterations": 2}
    with pytest.raises(ValueError, match="a file: setting 'iteration' is unknown; did you mean 'num_iterations'"):
        known_settings({"iteration": 2}, "a file")


NAMES = {
    "evaluation": ["network_loss", "classification_loss", "evaluate", "routing_statistics", "wrong_of", "load_for"],
    "report": ["show", "confusion_counts", "write_report", "read_log", "network_sections", "write_page", "Section"],
    "samples": ["Samples", "image_shape", "single", "fingerprint", "load_data"],
    "training": ["train", "Training", "build_network", "Diverged", "check_devices", "launched", "settle"],
    "settings": ["Settings", "read_settings", "FREE"],
    "files": ["write_whole"],
}


@pytest.mark.parametrize("module", NAMES)
def test_functions_under_their_paths_of_0_1(module):
    sys.modules.pop(f"fastcaps.{module}", None)
    with pytest.warns(DeprecationWarning, match=f"fastcaps.{module} is now "):
        old = importlib.import_module(f"fastcaps.{module}")
    assert all(callable(getattr(old, name)) or name.isupper() for name in NAMES[module])


def test_functions_that_became_methods():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from fastcaps.evaluation import network_loss
        from fastcaps.samples import image_shape, single
    data, settings = digits(), Settings(kernel_size=3)
    network = CapsNet((1, 8, 8), 10, stem_channels=4, kernel_size=3, types=2)
    images, labels, targets = data.test(torch.arange(3))
    assert network_loss(network, settings, images, labels, targets)[1].shape == (3, 10)
    assert image_shape(data) == (1, 8, 8)
    assert single(data) is data


def test_a_data_set_is_unpacked_with_a_warning():
    images, labels = torch.rand(6, 1, 4, 4), torch.arange(6)
    data = Dataset(images, labels, images[:2], labels[:2], 6)
    with pytest.warns(DeprecationWarning, match="Dataset as a tuple is now"):
        train_images, _, _, test_labels, num_classes, class_names = data
    assert train_images is images
    assert test_labels.tolist() == [0, 1]
    assert (num_classes, class_names) == (6, ())
    with pytest.warns(DeprecationWarning, match="Dataset as a tuple is now"):
        assert data[:2] == (images, labels)
