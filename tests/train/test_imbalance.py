"""Classes of different size: balanced sampling, class weights, classes that are never predicted or not there."""

import re

import pytest
import torch
from support.training_runs import TINY, assert_same, course, train

from fastcaps import CapsNet, cli
from fastcaps.data import Dataset
from fastcaps.models import CNN
from fastcaps.train import callbacks, run
from fastcaps.train.batches import Batches, balanced_order
from fastcaps.train.evaluation import class_counts, list_classes, never_predicted
from fastcaps.train.samples import class_weights
from fastcaps.train.settings import Settings

LABELS = torch.tensor([0] * 30 + [2] * 7 + [1] * 3)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]


# --------------------------------------------------------------------------------------------------- balanced sampling


def test_every_class_comes_equally_often():
    for epoch in range(3):
        order = balanced_order(LABELS, seed=0, epoch=epoch)
        classes = LABELS[order % 40]
        assert len(order) == 40
        for first in range(0, 39, 3):  # in any batch
            assert classes[first : first + 3].sort().values.tolist() == [0, 1, 2]
        assert order.equal(balanced_order(LABELS, 0, epoch))
        assert not order.equal(balanced_order(LABELS, 1, epoch))
        assert not order.equal(balanced_order(LABELS, 0, epoch + 1))


def test_each_class_goes_through_its_samples_in_rounds():
    labels = torch.cat([LABELS, torch.tensor([1, 1])])  # 30, 5 and 7 of 42: 14 of each in an epoch
    drawn = torch.cat([balanced_order(labels, 0, epoch) for epoch in range(30)])
    for label, n in enumerate((30, 5, 7)):
        own = drawn[labels[drawn % 42] == label]
        rounds = own[: len(own) // n * n].view(-1, n)
        members = (labels == label).nonzero()[:, 0]
        assert (rounds % 42).sort(1).values.eq(members).all()
        assert len((rounds % 42).unique(dim=0)) > 1
        assert (rounds // 42).equal(torch.arange(len(rounds))[:, None].expand(-1, n))


def test_balanced_batches_go_on_from_any_state():
    def batches() -> Batches:
        return Batches(lambda index, epoch: (index,), 40, 8, seed=3, labels=LABELS)

    whole = batches()
    everything = [index for _ in range(3) for (index,) in whole]
    for stop in range(1, 15):
        first = batches()
        taken = 0
        while taken < stop:
            for _ in first:
                taken += 1
                if taken == stop:
                    break
        second = batches()
        second.load_state_dict(first.state_dict())
        rest = [index for _ in range(3) for (index,) in second][: 15 - stop]
        assert all(a.equal(b) for a, b in zip(rest, everything[stop:], strict=True))
    parts = [Batches(lambda i, _: (i,), 40, 8, seed=3, labels=LABELS, rank=rank, world=2) for rank in (0, 1)]
    for (even,), (odd,), both in zip(*parts, everything[:5], strict=True):
        assert torch.stack([even, odd], 1).flatten().equal(both)


def test_there_is_a_label_for_each_sample():
    with pytest.raises(ValueError, match=r"labels must be \[count\] = \[41\], got \(40,\)"):
        Batches(lambda index, epoch: (index,), 41, 8, seed=3, labels=LABELS)


def test_a_sample_that_comes_again_is_augmented_in_another_way():
    images = torch.rand(4, 1, 9, 9)
    data = Dataset(images, torch.arange(4), images, torch.arange(4), 4)
    index = torch.tensor([1] * 20)
    later = index + 4 * torch.arange(20)
    options = {"seed": 0, "epoch": 0}
    assert data.train(later, **options)[0].equal(data.train(index, **options)[0])
    assert data.train(later, **options)[1].flatten().tolist() == [1] * 20
    shifted = data.train(later, **options, shift=2)[0]
    assert len(shifted.unique(dim=0)) > 5
    assert len(data.train(index, **options, shift=2)[0].unique(dim=0)) == 1


# ------------------------------------------------------------------------------------------------------- class weights


def test_balanced_weights_are_measured_on_the_training_images():
    images = torch.rand(40, 1, 4, 4)
    data = Dataset(images, LABELS, images, torch.zeros(40).long(), 4)  # none of class 3, and a test set of another kind
    weights = class_weights(data, Settings(class_weights="balanced"))
    torch.testing.assert_close(weights[:3], torch.tensor([40 / 90, 40 / 9, 40 / 21]))
    assert weights[3].isfinite()
    torch.testing.assert_close(weights[LABELS].mean(), torch.tensor(1.0))
    assert class_weights(data, Settings()) is None
    assert class_weights(data, Settings(class_weights="1,2,3,0.5")).tolist() == [1, 2, 3, 0.5]


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def greys(tmp_path):
    """Images of three classes: 14, 4 and 2 for training, 2 each for the test. All show the same."""
    from PIL import Image

    for name, count in (("many", 14), ("few", 4), ("rare", 2)):
        for part, number in (("train", count), ("test", 2)):
            (tmp_path / "greys" / part / name).mkdir(parents=True)
            for n in range(number):
                Image.new("L", (9, 9), 128).save(tmp_path / "greys" / part / name / f"{n}.png")
    return [*TINY, "--data", "image-folder", "--root", str(tmp_path / "greys"), "--batch-size", "5"]


@pytest.mark.train
@pytest.mark.usefixtures("no_figures")
def test_a_balanced_run_goes_on_as_if_nothing_had_been(greys, tmp_path, monkeypatch):
    options = [*greys, "--epochs", "2", "--sampling", "balanced", "--class-weights", "1,2,3", "--shift", "1"]
    assert train(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Keeper, "on_train_start", lambda self, *_: setattr(self, "interrupted", True))
        assert train(tmp_path / "again", *options) == 130  # after the first step
    assert train(tmp_path / "again", "--resume") == 0
    assert_same(tmp_path / "whole", tmp_path / "again")
    assert course(tmp_path / "whole") == course(tmp_path / "again")
    assert train(tmp_path / "again", "--resume", "--sampling", "uniform") == 1


@pytest.mark.train
@pytest.mark.usefixtures("no_figures")
def test_class_weights_reach_the_loss(greys, tmp_path):
    for name, weights in (("none", "none"), ("ones", "1,1,1"), ("one", "0,1,0")):
        assert train(tmp_path / name, *greys, "--class-weights", weights) == 0
    assert_same(tmp_path / "none", tmp_path / "ones")
    losses = [
        next(row["train_loss"] for row in course(tmp_path / name) if "train_loss" in row) for name in ("none", "one")
    ]
    assert losses[0] != losses[1]


@pytest.mark.train
def test_a_class_that_is_never_predicted_is_named(greys, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastcaps.train.report.network_sections", lambda *_: [])
    assert train(tmp_path, *greys) == 0  # images that are all alike are all taken for one class
    out, err = capsys.readouterr()
    assert "images/s, 2 of 3 classes never predicted" in out
    warned = re.search(r"warning: no test image was taken for (.*?)(;|$)", err)
    assert warned is not None
    missing = warned[1]
    assert set(missing.split(", ")) < {"many", "few", "rare"}
    assert [row["never_predicted"] for row in course(tmp_path) if "epoch" in row] == [2]
    assert f"<td>never predicted</td><td>{missing}</td>" in (tmp_path / "report.html").read_text()
    assert cli.main(["evaluate", str(tmp_path / "model.safetensors")]) == 0
    assert f"never predicted: {missing}\n" in capsys.readouterr().out


def test_what_may_help_depends_on_the_training_images():
    data = Dataset(torch.rand(40, 1, 4, 4), LABELS, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), 3)
    assert run._missing([1, 2], data, Settings()) == (
        "no test image was taken for 1, 2; they have at most 7 training images, another class 30: "
        "--sampling balanced or --class-weights balanced may help"
    )
    assert run._missing([0], data, Settings()) == "no test image was taken for 0"
    assert run._missing([1], data, Settings(sampling="balanced")) == "no test image was taken for 1"


def test_classes_that_are_never_predicted():
    scores = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.9, 0.2, 0.8, 0.1]])
    assert class_counts(scores, torch.tensor([[0], [2]])).tolist() == [[1, 0, 1, 0], [2, 0, 0, 0]]
    assert never_predicted(class_counts(scores, torch.tensor([[0], [2]]))) == [2]
    assert never_predicted(class_counts(scores, torch.tensor([[0, 1], [0, 3]]))) == [3]
    assert list_classes([0, 2], ["ant"]) == "ant, 2"
    assert list_classes(range(23), []).endswith("18, 19 and 3 more")


# ---------------------------------------------------------------------------------------------------- no class is there


@pytest.mark.train
def test_show_says_that_no_class_is_present(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setattr("fastcaps.train.show.network_sections", lambda *_: [])
    Image.new("L", (8, 8), 128).save(tmp_path / "grey.png")

    def shown(network) -> str:
        network.save(tmp_path / "model.safetensors")
        arguments = [str(tmp_path / "model.safetensors"), str(tmp_path / "grey.png"), "--out", str(tmp_path / "a.html")]
        assert cli.main(["show", *arguments]) == 0
        return capsys.readouterr().out.splitlines()[0]

    network = CapsNet((1, 8, 8), 3, stem_channels=4, kernel_size=3, types=2)
    assert re.search(r"grey\.png: no class is present, as all are below 0\.5: \d \(0\.\d+\), \d", shown(network))
    with torch.no_grad():
        network.capsules.weight *= 1e4
    assert re.search(r"grey\.png: \d \(0\.9\d*\)|grey\.png: \d \(1\.0", shown(network))
    probabilities_add_to_1 = CNN((1, 8, 8), 3, channels=(4,), units=(6,))
    assert re.search(r"grey\.png: \d \(0\.[34]\d*\)", shown(probabilities_add_to_1))
