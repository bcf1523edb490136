"""Training batches in an order that depends on seed and epoch alone."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastcaps.data.augment import random_integers


class Batches:
    """Training batches in an order that depends on seed and epoch alone; iteration can resume at any of them.

    Each iteration is one epoch: the next one, or what is left of one that was interrupted. Of a global batch, process
    ``rank`` of ``world`` gets every ``world``-th sample, so that any number of processes sees the same global batches.

    Args:
        sample: makes a batch, a tuple of tensors, from indices ``[B]`` int64 below ``count`` and the epoch. What is
            random in it should depend on these alone, as :func:`augment` does.
        count: how many samples there are.
        batch_size: samples of a global batch; those left over at the end of an epoch are dropped, and others each time.
        seed: of the run.
        rank: which process this is.
        world: how many there are.
        accumulate: in how many parts each global batch is given, one after the other, for gradients that are summed.
        labels: ``[count]`` int64, on the CPU: each class comes equally often, see :func:`balanced_order`. None: each
            sample comes once an epoch.

    Raises:
        ValueError: there are fewer samples than a batch holds, ``batch_size`` is no multiple of ``world * accumulate``,
            ``rank`` is not below ``world``, or there is not a label for each sample.

    Example:
        >>> images, labels = torch.rand(10, 1, 8, 8), torch.arange(10)
        >>> batches = Batches(lambda index, epoch: (images[index], labels[index]), 10, 4, seed=0)
        >>> [labels.shape for images, labels in batches]
        [torch.Size([4]), torch.Size([4])]
    """

    def __init__(
        self,
        sample: Callable[[Tensor, int], tuple[Tensor, ...]],
        count: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        labels: Tensor | None = None,
    ) -> None:
        if not 1 <= batch_size <= count:
            raise ValueError(f"batch_size must be from 1 to {count}, the number of samples, got {batch_size}")
        if batch_size % (world * accumulate):
            raise ValueError(f"batch_size {batch_size} must be a multiple of {world} processes x {accumulate} parts")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
        if labels is not None and labels.shape != (count,):
            raise ValueError(f"labels must be [count] = [{count}], got {tuple(labels.shape)}")
        self.sample, self.count, self.batch_size, self.seed = sample, count, batch_size, seed
        self.rank, self.world, self.accumulate, self.labels = rank, world, accumulate, labels
        self.epoch = self.position = 0  # of the next batch

    def __len__(self) -> int:
        """Number of batches in an epoch, parts counted."""
        return self.count // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self.epoch
        order = self._order(epoch)
        for position in range(self.position, len(self)):
            last = position == len(self) - 1
            # Before the batch is given away: a state taken while it is worked on says what comes next.
            self.epoch, self.position = (epoch + 1, 0) if last else (epoch, position + 1)
            first = position // self.accumulate * self.batch_size
            own = order[first : first + self.batch_size][self.rank :: self.world]
            yield self.sample(own.chunk(self.accumulate)[position % self.accumulate], epoch)

    def _order(self, epoch: int) -> Tensor:
        """The samples of an epoch, ``[count]`` int64."""
        if self.labels is not None:
            return balanced_order(self.labels, self.seed, epoch)
        return random_integers(2**20, torch.arange(self.count), self.seed, epoch, 5).argsort(stable=True)

    def state_dict(self) -> dict[str, int]:
        """Epoch and position of the next batch."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the batch of a :meth:`state_dict`.

        Raises:
            ValueError: an epoch has no such batch.
        """
        if not 0 <= state["position"] < len(self):
            raise ValueError(f"position must be from 0 to {len(self) - 1}, got {state['position']}")
        self.epoch, self.position = state["epoch"], state["position"]


def balanced_order(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """An epoch's samples with every class equally often: a pure function of labels, seed and epoch.

    Each class goes through its own samples in shuffled rounds, over the epochs. Of J classes, each stands once in every
    J samples.

    Args:
        labels: ``[N]`` int64, on the CPU.
        seed: of the run.
        epoch: which one it is.

    Returns:
        ``[N]`` int64: sample n of round r is ``n + r N``, so that each round augments it in another way.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 0, 1])
        >>> order = balanced_order(labels, seed=0, epoch=0)
        >>> labels[order % 6].bincount()
        tensor([3, 3])
    """
    N = len(labels)
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    each = -(-N // len(members))  # samples of a class
    chosen = torch.stack([_shuffled_rounds(own, N, each * epoch, each, seed) for own in members], 1)  # [each, J]
    place = torch.arange(chosen.numel()).view_as(chosen)
    mixed = random_integers(2**20, place, seed, epoch, 6).argsort(dim=1, stable=True)
    return chosen.gather(1, mixed).flatten()[:N]


def _shuffled_rounds(members: Tensor, N: int, first: int, count: int, seed: int) -> Tensor:
    """``count`` entries, from ``first`` on, of all the members again and again, in another order in each round."""
    n = len(members)
    rounds = torch.arange(first // n, (first + count - 1) // n + 1)
    numbers = members + N * rounds[:, None]  # [rounds, n]
    mixed = random_integers(2**20, numbers, seed, 7).argsort(dim=1, stable=True)
    return numbers.gather(1, mixed).flatten()[first % n :][:count]
