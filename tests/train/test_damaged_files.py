"""Files of a run that are damaged or edited: each edit is harmless, or refused in one line that names the file."""

import functools
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.edits import damaged, edited, fine_or_a_line_about
from support.training_runs import SMALL, train

from fastcaps import CapsNet, cli, data
from fastcaps.models import CNN
from fastcaps.models.network import CHECKSUM, METADATA, Network
from fastcaps.train import callbacks
from fastcaps.train.callbacks import WholeFiles
from fastcaps.train.evaluation import class_names
from fastcaps.train.run import settle
from fastcaps.train.settings import Settings, read_settings, run_settings

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was stopped after its first step."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks.Keeper, "on_train_start", lambda self, *_: setattr(self, "interrupted", True))
        assert train(out, *SMALL, "--epochs", "1", "--batch-size", "700", "--reconstruction", "0") == 130
    return out


def reread(out: Path) -> None:
    """Read a run's folder as ``--config`` and ``--resume`` do."""
    Settings(**read_settings(out / "config.json", {}))
    settle({}, out, resume=True)


@pytest.fixture
def _digits_at_hand(monkeypatch):
    monkeypatch.setattr(data, "digits", functools.cache(data.digits))


@pytest.mark.usefixtures("_digits_at_hand")
def test_settings_that_were_edited(stopped, tmp_path):
    config, file = json.loads((stopped / "config.json").read_text()), tmp_path / "config.json"
    for seed in range(100):
        made, edit = edited(config, seed)
        file.write_text(json.dumps(made))
        with fine_or_a_line_about(tmp_path, edit):
            reread(tmp_path)


@pytest.mark.usefixtures("_digits_at_hand")
def test_settings_that_were_damaged(stopped, tmp_path):
    content, file = (stopped / "config.json").read_bytes(), tmp_path / "config.json"
    for seed in range(50):
        file.write_bytes(damaged(content, seed))
        with fine_or_a_line_about(tmp_path, f"seed {seed}"):
            reread(tmp_path)
    for text in (
        "[" * 100_000,
        '{"a":' * 900,
        "1" * 5000,
        '{"lr": ' + "1" * 4000 + "}",
        '{"settings": ' + "[" * 900 + "]" * 900 + "}",
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_settings(file, {})


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    """The smallest of networks, as a run leaves it."""
    run = {"settings": {"data": "digits", "types": 1}, "data": {"class names": [f"{n}" for n in range(10)]}}
    network = CapsNet(
        (1, 4, 4), 10, kernel_size=2, stem_channels=2, types=1, primary_dim=2, capsule_dim=2, decoder=False
    )
    network.save(tmp_path_factory.mktemp("files") / "small.safetensors", run=run)
    return tmp_path_factory.getbasetemp() / "files0" / "small.safetensors"


def use(path: Path) -> Network:
    """Read a network as ``evaluate`` and ``show`` do, and let it run."""
    network = Network.load(path)
    described = json.loads(safe_open(path, "pt").metadata()[METADATA])
    class_names(path, network.num_classes)
    run_settings(described.get("run", {}).get("settings", {}), str(path))
    if network.config.get("num_iterations", 1) < 100:  # more take longer, and are no mistake
        network.eval().probabilities(torch.rand(2, *network.image_shape, dtype=network.dtype))
    return network


def same(one: Network, other: Network) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return one.config == other.config and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_network_of_which_a_byte_is_changed_is_refused(small_file, tmp_path):
    content, path, whole = small_file.read_bytes(), tmp_path / "n.safetensors", use(small_file)
    assert len(content) < 3000
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        with fine_or_a_line_about(path, f"byte {at}"):
            assert same(use(path), whole), at  # a space in the header that is another space now
    for seed in range(50):
        path.write_bytes(damaged(content, seed))
        with fine_or_a_line_about(path, f"seed {seed}"):
            assert same(use(path), whole), seed


@pytest.mark.parametrize("kind", ["capsnet", "convention", "cnn"])
def test_a_network_whose_description_was_edited(tmp_path, kind):
    path = tmp_path / "n.safetensors"
    run = {"settings": {"data": "digits", "types": 1}, "data": {"class names": ["a", "b", "c"]}}
    if kind == "cnn":
        network: Network = CNN((1, 4, 4), 3, channels=(2,), units=(3,))
    else:
        from fastcaps.routing.conventions import Convention

        options = (
            {"routing": Convention(softmax="inputs")} if kind == "convention" else {"leaky": True, "detach": False}
        )
        network = CapsNet(
            (1, 5, 5), 3, kernel_size=2, stem_channels=2, types=1, hidden_capsules=[(3, 2)], eps=1e-8, **options
        )
    network.save(path, run=run)
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()[METADATA])
    state = load_file(path)
    for seed in range(100):
        made, edit = edited(described, seed)
        save_file(state, path, {METADATA: json.dumps(made)})  # without a checksum, as 0.1 wrote it
        with fine_or_a_line_about(path, edit):
            use(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eps": float("nan")}, "eps must be finite"),
        ({"decoder": "no"}, "decoder must be true or false"),
        ({"leaky": 1}, "leaky must be true or false"),
        ({"types": 10**9}, r"capsules\.weight is"),
        ({"num_classes": 2**62}, "weights and configuration do not fit"),
        ({"unknown": 1}, "CapsuleLayer has no option unknown"),
        ({"routing": {"softmax": "inputs"}, "unknown": 1}, "CapsuleLayer has no option unknown"),
        ({"routing": [1]}, "must be a mapping"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be(small_file, tmp_path, config, message):
    with safe_open(small_file, "pt") as file:
        described = json.loads(file.metadata()[METADATA])
    described["config"] |= config
    path = tmp_path / "n.safetensors"
    save_file(load_file(small_file), path, {METADATA: json.dumps(described)})
    with pytest.raises(ValueError, match=message):
        Network.load(path)


@pytest.mark.parametrize("option", [{"device": "cuda:7"}, {"backend": "evil"}], ids=str)
def test_what_is_decided_where_a_file_is_read(small_file, tmp_path, option):
    """Version 0.1 wrote the device that a network was made on."""
    with safe_open(small_file, "pt") as file:
        described = json.loads(file.metadata()[METADATA])
    described["config"] |= option
    save_file(load_file(small_file), tmp_path / "n.safetensors", {METADATA: json.dumps(described)})
    assert same(Network.load(tmp_path / "n.safetensors"), Network.load(small_file))


def test_a_name_of_two_lines(small_file, tmp_path):
    path = tmp_path / "n.safetensors"
    save_file(load_file(small_file), path, {METADATA: json.dumps({"model": "a\nb", "version": "1", "config": {}})})
    with fine_or_a_line_about(path, "model"):
        Network.load(path)


def test_tensors_that_no_network_has(small_file, tmp_path):
    with safe_open(small_file, "pt") as file:
        metadata = file.metadata()
    path, state = tmp_path / "n.safetensors", load_file(small_file)
    changed = {name: value + 1 for name, value in state.items()}
    save_file(changed, path, metadata)
    with pytest.raises(ValueError, match="was changed by another program"):
        Network.load(path)
    del metadata[CHECKSUM]
    save_file(changed, path, metadata)  # as a file of 0.1
    assert torch.equal(Network.load(path).state_dict()["stem.bias"], state["stem.bias"] + 1)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2):
        save_file({name: value.to(dtype) for name, value in state.items()}, path, metadata)
        with pytest.raises(ValueError, match="which no network of fastcaps has"):
            Network.load(path)
    save_file({}, path, metadata)
    with pytest.raises(ValueError, match=r"one of both lacks capsules\.bias, capsules\.weight"):
        Network.load(path)


def test_a_checkpoint_of_which_a_byte_is_changed_is_refused(stopped, tmp_path):
    content, path = (stopped / "last.ckpt").read_bytes(), tmp_path / "last.ckpt"
    whole = WholeFiles().load_checkpoint(stopped / "last.ckpt")
    for at in range(0, len(content), max(1, len(content) // 150)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        with fine_or_a_line_about(path, f"byte {at}"):  # fine: of what lies between the members of the archive
            assert str(WholeFiles().load_checkpoint(path)) == str(whole), at
    for seed in range(50):
        path.write_bytes(damaged(content, seed))
        with fine_or_a_line_about(path, f"seed {seed}"):
            assert str(WholeFiles().load_checkpoint(path)) == str(whole)


@pytest.mark.usefixtures("no_figures", "_digits_at_hand")
@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, 200), marks=pytest.mark.slow)], ids=len)
def test_a_checkpoint_that_was_edited(stopped, tmp_path, capsys, seeds):
    """The last step of the run is made after each edit that is harmless."""
    out, checkpoint = tmp_path / "run", torch.load(stopped / "last.ckpt", weights_only=True)
    checkpoint["state_dict"] = dict(checkpoint["state_dict"])
    hostile = [
        None,
        True,
        -1,
        10**9,
        2.5,
        float("nan"),
        "x",
        [],
        [1],
        {},
        torch.rand(2),
        torch.zeros((), dtype=torch.bool),
    ]
    statuses = set()
    for seed in seeds:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(stopped, out)
        made, edit = edited(checkpoint, seed, hostile)
        torch.save(made, out / "last.ckpt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                statuses.add(status := train(out, "--resume"))
            except Exception as error:
                raise AssertionError(f"{edit}: {type(error).__name__}: {error}") from error
        lines = capsys.readouterr().err.splitlines()
        assert status == 0 or (len(lines) == 1 and str(out) in lines[0]), f"{edit}: {lines}"
    assert statuses == {0, 1}


@pytest.mark.usefixtures("no_figures")
def test_a_checkpoint_of_another_version_of_lightning_goes_on(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    checkpoint = torch.load(stopped / "last.ckpt", weights_only=True)
    checkpoint["pytorch-lightning_version"] = "2.5.0"
    del checkpoint["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"]
    torch.save(checkpoint, tmp_path / "run" / "last.ckpt")
    assert train(tmp_path / "run", "--resume") == 0


def test_a_log_that_was_damaged(whole, tmp_path):
    from fastcaps.train.report import read_log

    folder = tmp_path / "log" / "version_0"
    folder.mkdir(parents=True)
    (tmp_path / "log" / "version_of_mine").mkdir()
    content = (whole / "log" / "version_0" / "metrics.csv").read_bytes()
    counts = []
    for seed in range(50):
        (folder / "metrics.csv").write_bytes(damaged(content, seed) + b"\0\0\0\n\xff\xfe,1\n")
        counts.append(len(read_log(tmp_path)))
    assert max(counts) == len(read_log(whole))  # a digit that is another one costs no row


def test_the_command_says_it_in_a_line(small_file, tmp_path, capsys):
    path = tmp_path / "n.safetensors"
    path.write_bytes(small_file.read_bytes()[:-1])
    for command in (["evaluate", str(path)], ["show", str(path), "none.png"], ["doctor", str(path)]):
        assert cli.main(command) == (2 if command[0] == "doctor" else 1)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fastcaps {command[0]}: ")
        assert str(path) in line
