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

    Raises:
        ValueError: there are fewer samples than a batch holds, ``batch_size`` is no multiple of ``world * accumulate``,
            or ``rank`` is not below ``world``.

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
    ) -> None:
        if not 1 <= batch_size <= count:
            raise ValueError(f"batch_size must be from 1 to {count}, the number of samples, got {batch_size}")
        if batch_size % (world * accumulate):
            raise ValueError(f"batch_size {batch_size} must be a multiple of {world} processes x {accumulate} parts")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
        self.sample, self.count, self.batch_size, self.seed = sample, count, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.epoch = self.position = 0  # of the next batch

    def __len__(self) -> int:
        """Number of batches in an epoch, parts counted."""
        return self.count // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self.epoch
        order = random_integers(2**20, torch.arange(self.count), self.seed, epoch, 5).argsort(stable=True)
        for position in range(self.position, len(self)):
            last = position == len(self) - 1
            # Before the batch is given away: a state taken while it is worked on says what comes next.
            self.epoch, self.position = (epoch + 1, 0) if last else (epoch, position + 1)
            first = position // self.accumulate * self.batch_size
            own = order[first : first + self.batch_size][self.rank :: self.world]
            yield self.sample(own.chunk(self.accumulate)[position % self.accumulate], epoch)

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
