"""One step: losses, scores, routing statistics, precision and compilation."""

import re

import pytest
import torch
from support.training_runs import SMALL, assert_same, course, train, weights

from fastcaps import CapsNet, cli
from fastcaps.losses import margin_loss, spread_loss
from fastcaps.models import CNN
from fastcaps.models.capsnet import classification_loss
from fastcaps.models.network import Network
from fastcaps.train.evaluation import confusion_counts, routing_statistics, wrong_of
from fastcaps.train.module import build_network
from fastcaps.train.samples import Samples, load_data
from fastcaps.train.settings import Settings

pytestmark = pytest.mark.train


def curve(backend: str, dtype: torch.dtype, change: float = 0.0) -> torch.Tensor:
    """The losses of 100 steps."""
    settings = Settings(stem=16, types=4, backend=backend)
    data = load_data(settings)
    settings = settings.resolved(data.image_shape)
    samples = Samples(data, settings)
    network = build_network(settings, data.image_shape, 10).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + change)
    optimizer = torch.optim.Adam(network.parameters())
    losses = []
    for step in range(100):
        index = torch.arange(step * 32, step * 32 + 32) % 1438
        images, labels, targets = samples.train(index, step)
        loss, _ = network.training_loss(images.to(dtype), labels, targets.to(dtype), **settings.loss_options())
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
        network.capsules.bias[1:] = 0
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
    with pytest.raises(ValueError, match=r"holds a fastcaps model 'CNN', not a CapsNet"):
        CapsNet.load(tmp_path / "cnn.safetensors")
    with pytest.raises(ValueError, match=r"\[B, 1, 8, 8\]"):
        small(torch.rand(2, 1, 8, 9))


@pytest.mark.usefixtures("no_figures")
@pytest.mark.slow
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
    assert compiled == [("training_loss", {"fullgraph": True})]
    assert train(tmp_path / "eager", *options) == 0
    half, eager = (
        [row["train_loss"] for row in course(tmp_path / name) if "train_loss" in row] for name in ("half", "eager")
    )
    assert half == pytest.approx(eager, rel=0.02)
    assert_same(tmp_path / "compiled", tmp_path / "eager", 1e-4)


@pytest.mark.usefixtures("no_figures")
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, capsys):
    assert train(tmp_path, *SMALL, "--lr", "1e36", "--checkpoint-seconds", "0", "--reconstruction", "0") == 1
    err = capsys.readouterr().err
    assert re.search(r"step \d+, epoch \d: the (loss|norm of the gradient) is (nan|inf)", err)
    assert "routing: dead" in err
    assert f"last good checkpoint: {tmp_path / 'last.ckpt'}" in err
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(x.isfinite().all() for x in state.values())
