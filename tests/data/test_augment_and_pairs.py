"""Random numbers, augmentation and pairs: pure functions of their indices."""

import pytest
import torch

from fastcaps.data import Dataset, MultiMNIST
from fastcaps.data.augment import augment, random_integers


def test_random_integers_are_uniform_and_depend_on_every_key():
    index = torch.arange(60_000)
    draws = [random_integers(10, index, *key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, -3, 0))]
    for x in draws:
        assert 0 <= int(x.min()) <= int(x.max()) <= 9
        expected = len(index) / 10
        assert ((torch.bincount(x, minlength=10) - expected) ** 2 / expected).sum() < 40  # chi^2, 9 degrees: p = 8e-6
    for n, x in enumerate(draws):
        for y in draws[:n]:
            assert abs((x == y).double().mean() - 0.1) < 0.01
    assert torch.equal(random_integers(10, index[500:600], 0, 0, 0), draws[0][500:600])
    assert random_integers(1, index, 5).eq(0).all()


def test_augmentation_is_a_shift_and_depends_on_indices_alone():
    images, index = torch.rand(300, 2, 6, 7), torch.randperm(300)
    out = augment(images, index, seed=3, epoch=4, shift=2)
    again = augment(images[[5, 2]], index[[5, 2]], seed=3, epoch=4, shift=2)
    assert torch.equal(again, out[[5, 2]])
    assert not torch.equal(out, augment(images, index, seed=3, epoch=5, shift=2))
    seen = set()
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for n in range(300):
        places = [(a, b) for a in range(5) for b in range(5) if torch.equal(out[n], padded[n, :, a : a + 6, b : b + 7])]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 25
    flipped = augment(images, index, seed=3, epoch=4, shift=0, flip=True)
    mirrored = torch.tensor([torch.equal(flipped[n], images[n].flip(2)) for n in range(300)])
    same = torch.tensor([torch.equal(flipped[n], images[n]) for n in range(300)])
    assert torch.equal(mirrored, ~same)
    assert 110 < int(mirrored.sum()) < 190
    assert torch.equal(augment(images, index, seed=0, epoch=0, shift=0), images)
    with pytest.raises(ValueError, match="shift must not be negative"):
        augment(images, index, seed=0, epoch=0, shift=-1)
    with pytest.raises(ValueError, match=r"index \[B\]"):
        augment(images, index[:3], seed=0, epoch=0)


def test_pairs_of_digits():
    images = torch.zeros(200, 1, 28, 28)
    images[:, :, 4:24, 4:24] = torch.rand(200, 1, 20, 20) * 0.9 + 0.1  # what fills the box of 20x20
    labels = torch.arange(200) % 10
    pairs = MultiMNIST(Dataset(images, labels, images[:50], labels[:50], 10))
    index = torch.arange(500)
    x, alone, y = pairs.batch(index, seed=1, epoch=2)
    assert (x.shape, alone.shape, y.shape) == ((500, 1, 36, 36), (500, 2, 36, 36), (500, 2))
    assert y[:, 0].ne(y[:, 1]).all()
    assert torch.equal(y[:, 0], labels[index % 200])
    assert torch.equal(x[:, 0], alone.amax(1))
    boxes = alone > 0
    shared, area = boxes.all(1).sum((1, 2)), boxes[:, 0].sum((1, 2))
    assert area.eq(400).all()  # nothing is cut off
    assert shared.min() >= 320
    assert shared.max() == 400
    corner = boxes[:, 0].flatten(1).int().argmax(1)
    assert {int(c) // 36 for c in corner} == set(range(4, 13))  # from -4 to 4 pixels
    again = pairs.batch(index[[7, 3]], seed=1, epoch=2)
    assert all(torch.equal(a, b[[7, 3]]) for a, b in zip(again, (x, alone, y), strict=True))
    assert not torch.equal(pairs.batch(index, seed=1, epoch=3)[0], x)
    assert pairs.batch(index, seed=1, epoch=2, train=False)[0].shape == (500, 1, 36, 36)


def small_set() -> Dataset:
    images = torch.rand(20, 1, 28, 28)
    return Dataset(images, torch.arange(20) % 10, images[:6], torch.arange(6), 10)


def test_samples_of_a_data_set():
    data, index = small_set(), torch.tensor([3, 17, 4])
    assert (data.image_shape, data.num_train, data.num_test) == ((1, 28, 28), 20, 6)
    images, labels, targets = data.train(index, seed=1, epoch=2)
    assert images.equal(data.train_images[index])
    assert labels.tolist() == [[3], [7], [4]]
    images, _, targets = data.train(index, seed=1, epoch=2, shift=2, flip=True)
    assert images.equal(augment(data.train_images[index], index, seed=1, epoch=2, shift=2, flip=True))
    assert targets.equal(images[:, None])
    images, labels, targets = data.test(torch.tensor([5]))
    assert images.equal(data.test_images[5:])
    assert targets.equal(images[:, None])
    assert labels.tolist() == [[5]]
    assert data.to("meta").test_images.is_meta
    assert data.to("meta").num_classes == 10


def test_samples_of_pairs():
    pairs, index = MultiMNIST(small_set()), torch.tensor([3, 17, 4])
    assert (pairs.image_shape, pairs.num_train, pairs.num_test) == ((1, 36, 36), 20, 6)
    assert pairs.class_names == ()
    made = (pairs.train(index, seed=1, epoch=2), pairs.batch(index, seed=1, epoch=2))
    made += (pairs.test(index[[0, 2]]), pairs.batch(index[[0, 2]], seed=0, epoch=0, train=False))
    for (images, labels, targets), (both, alone, classes) in (made[:2], made[2:]):
        assert images.equal(both)
        assert labels.equal(classes)
        assert targets.equal(alone[:, :, None])
    for options in ({"shift": 1}, {"flip": True}):
        with pytest.raises(ValueError, match="shifted already"):
            pairs.train(index, seed=1, epoch=2, **options)
    assert pairs.to("meta").device.type == "meta"
