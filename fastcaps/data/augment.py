"""Augmentation and random numbers as pure functions of seed, epoch and index."""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_integers(high: int, index: Tensor, *key: int) -> Tensor:
    """A number in [0, high) for each index: a pure function of index and key, on any device, in any order.

    Args:
        high: at least 1, at most 2^20.
        index: int64, any shape.
        key: integers that tell streams apart: seed, epoch, what the number is for.

    Returns:
        int64, shape and device of ``index``.

    Example:
        >>> random_integers(10, torch.arange(4), 0, 1).equal(random_integers(10, torch.arange(4), 0, 1))
        True
    """
    x = index.long()
    for k in key:
        x = _mixed(x + _signed(_mixed_int(k)))
    return ((_mixed(x) >> 20) & 0xFFFFFFFF) * high >> 32


_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64 (Steele et al. 2014)


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; products wrap around."""
    x = x + _signed(_GOLDEN)
    for shift, factor in ((30, _M1), (27, _M2)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _mixed_int(x: int) -> int:
    """The same for one number, without a tensor: this is done several times a step."""
    x = (x + _GOLDEN) % 2**64
    for shift, factor in ((30, _M1), (27, _M2)):
        x = (x ^ x >> shift) * factor % 2**64
    return x ^ x >> 31


def augment(images: Tensor, index: Tensor, *, seed: int, epoch: int, shift: int = 2, flip: bool = False) -> Tensor:
    """Shift each image by up to ``shift`` pixels, and mirror half of them: a pure function of seed, epoch and index.

    Args:
        images: ``[B, C, H, W]``, on any device.
        index: ``[B]`` int64, which images of the data set they are; best on the CPU, where its many small operations
            cost less than as many launches.
        seed: of the run.
        epoch: which pass over the data it is.
        shift: in pixels, in each direction; what comes in is 0 (Sabour 2017, section 4: 2 pixels on MNIST).
        flip: whether half of the images are mirrored left to right.

    Returns:
        ``[B, C, H, W]``, a new tensor.

    Raises:
        ValueError: shapes do not fit, or the shift is negative.

    Example:
        >>> augment(torch.rand(2, 1, 8, 8), torch.tensor([5, 7]), seed=0, epoch=1).shape
        torch.Size([2, 1, 8, 8])
    """
    if images.dim() != 4 or index.shape != images.shape[:1]:
        raise ValueError(f"images must be [B, C, H, W] and index [B], got {list(images.shape)} and {list(index.shape)}")
    if shift < 0:
        raise ValueError(f"shift must not be negative, got {shift}")
    H, W = images.shape[2:]
    down, right = (random_integers(2 * shift + 1, index, seed, epoch, n).to(images.device) for n in (0, 1))
    padded = F.pad(images, (shift, shift, shift, shift))
    rows = torch.arange(H, device=images.device) + down[:, None]  # [B, H]
    columns = torch.arange(W, device=images.device) + right[:, None]  # [B, W]
    if flip:
        mirrored = random_integers(2, index, seed, epoch, 2).bool().to(images.device)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    batch = torch.arange(len(images), device=images.device)
    return padded.movedim(1, 3)[batch[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()
