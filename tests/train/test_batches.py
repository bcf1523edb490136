"""Order of the training batches: over epochs, processes and parts, and after an interruption."""

import pytest
import torch

from fastcaps.data.augment import augment
from fastcaps.train.batches import Batches


def batches_of(images, labels, batch_size, *, seed=0, shift=0, flip=False, **options) -> Batches:
    def sample(index, epoch):
        return augment(images[index], index, seed=seed, epoch=epoch, shift=shift, flip=flip), labels[index]

    return Batches(sample, len(labels), batch_size, seed=seed, **options)


def labels_of(batches: Batches) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches]


def test_batches_are_permutations_that_change_with_epoch_and_seed():
    images, labels = torch.rand(103, 1, 4, 4), torch.arange(103)
    batches = batches_of(images, labels, 10, seed=0)
    epochs = [labels_of(batches) for _ in range(3)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [10] * len(batches)
        assert len({n for batch in epoch for n in batch}) == 100
    assert epochs[0] != epochs[1] != epochs[2]
    assert labels_of(batches_of(images, labels, 10, seed=0)) == epochs[0]
    assert labels_of(batches_of(images, labels, 10, seed=1)) != epochs[0]
    left = [set(range(103)) - {n for batch in epoch for n in batch} for epoch in epochs]
    assert left[0] != left[1]  # it is not always the same ones that are dropped
    x, y = next(iter(batches))
    assert torch.equal(x, images[y])


def test_batches_go_on_from_any_state():
    images, labels = torch.rand(40, 1, 4, 4), torch.arange(40)
    options = {"seed": 3, "shift": 1, "flip": True}
    whole = batches_of(images, labels, 8, **options)
    everything = [batch for _ in range(3) for batch in whole]
    for stop in range(15):
        first = batches_of(images, labels, 8, **options)
        taken = 0
        while taken < stop:
            for _ in first:
                taken += 1
                if taken == stop:
                    break
        second = batches_of(images, labels, 8, **options)
        second.load_state_dict(first.state_dict())
        rest = [batch for _ in range(3) for batch in second][: 15 - stop]
        assert len(rest) == 15 - stop
        for a, b in zip(rest, everything[stop:], strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_global_batches(world):
    images, labels = torch.rand(40, 1, 4, 4), torch.arange(40)
    one = list(batches_of(images, labels, 8, seed=0, shift=2))
    parts = [list(batches_of(images, labels, 8, seed=0, shift=2, rank=rank, world=world)) for rank in range(world)]
    for n, (x, y) in enumerate(one):
        for rank in range(world):
            assert torch.equal(parts[rank][n][0], x[rank::world])
            assert torch.equal(parts[rank][n][1], y[rank::world])


def test_parts_of_a_batch():
    images, labels = torch.rand(43, 1, 4, 4), torch.arange(43)
    whole = list(batches_of(images, labels, 12, shift=1))
    for rank in range(2):
        parts = batches_of(images, labels, 12, shift=1, rank=rank, world=2, accumulate=3)
        assert len(parts) == 9
        given = list(parts)
        for n, (x, y) in enumerate(whole):
            assert torch.equal(torch.cat([part[0] for part in given[3 * n : 3 * n + 3]]), x[rank::2])
            assert torch.equal(torch.cat([part[1] for part in given[3 * n : 3 * n + 3]]), y[rank::2])


@pytest.mark.parametrize(
    ("batch_size", "options", "match"),
    [
        (0, {}, "from 1 to 9"),
        (10, {}, "from 1 to 9"),
        (3, {"world": 2}, "multiple"),
        (4, {"accumulate": 3}, "multiple"),
        (8, {"world": 2, "accumulate": 8}, "multiple"),
        (4, {"world": 2, "rank": 2}, "rank"),
    ],
)
def test_batches_that_cannot_be(batch_size, options, match):
    with pytest.raises(ValueError, match=match):
        batches_of(torch.rand(9, 1, 4, 4), torch.arange(9), batch_size, **options)
