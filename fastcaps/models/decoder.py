"""The decoder of Sabour et al. (2017): an image from class capsules."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastcaps._checks import check_positive
from fastcaps._deprecated import warn_renamed
from fastcaps.functional import length
from fastcaps.losses import one_hot, present_classes
from fastcaps.models.network import check_image_shape

HIDDEN = (512, 1024)  # the paper's hidden layers


def _order_of_0_1(init: Callable[..., None]) -> Callable[..., None]:
    """Take the arguments in the order of version 0.1, too, where ``image_shape`` stood third."""

    @functools.wraps(init)
    def call(self: "Decoder", *args: Any, **kwargs: Any) -> None:
        if args and isinstance(args[0], int):
            warn_renamed(
                "Decoder(num_classes, capsule_dim, image_shape)", "Decoder(image_shape, num_classes, capsule_dim)"
            )
            names = ("num_classes", "capsule_dim", "image_shape", "hidden")
            given = dict(zip(names, args, strict=False))
            if len(args) > len(names) or given.keys() & kwargs.keys():
                raise TypeError(f"Decoder takes {', '.join(names)}, each once")
            args, kwargs = (), given | kwargs
        init(self, *args, **kwargs)

    return call


class Decoder(nn.Module):
    """Draws the image that one class capsule, or several, stand for (Sabour et al. 2017, figure 2).

    Args:
        image_shape: ``(C, H, W)``.
        num_classes: J.
        capsule_dim: D_out.
        hidden: widths of the hidden layers.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1.

    Example:
        >>> import torch
        >>> Decoder((1, 28, 28), 10, 16)(torch.randn(2, 10, 16), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 28, 28])
    """

    @_order_of_0_1
    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        capsule_dim: int,
        hidden: tuple[int, ...] = HIDDEN,
    ) -> None:
        super().__init__()
        C, H, W = check_image_shape(image_shape)
        check_positive(num_classes=num_classes, capsule_dim=capsule_dim)
        check_positive(**{f"hidden[{n}]": width for n, width in enumerate(hidden)})
        self.poses_shape, self.image_shape = (num_classes, capsule_dim), (C, H, W)
        widths = [num_classes * capsule_dim, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(self.image_shape)), nn.Sigmoid())

    def forward(self, poses: Tensor, labels: Tensor | None = None) -> Tensor:
        """Draw one capsule of each sample, or several together; all others are set to 0 first.

        Args:
            poses: ``[B, J, D_out]``, dtype of the parameters.
            labels: which capsules are drawn: class indices ``[B]``, or bool ``[B, J]``, all that are True together.
                None: the longest.

        Returns:
            Images ``[B, C, H, W]`` in [0, 1].

        Raises:
            TypeError: labels are neither indices nor bool.
            ValueError: shapes do not fit, or a label is out of range.

        Example:
            >>> import torch
            >>> decoder, poses = Decoder((1, 8, 8), 10, 16), torch.randn(2, 10, 16)
            >>> decoder(poses).shape
            torch.Size([2, 1, 8, 8])
            >>> decoder(poses, torch.rand(2, 10) > 0.5).shape
            torch.Size([2, 1, 8, 8])
        """
        if not isinstance(poses, Tensor) or poses.dim() != 3 or poses.shape[1:] != self.poses_shape:
            got = tuple(poses.shape) if isinstance(poses, Tensor) else type(poses).__name__
            J, D_out = self.poses_shape
            raise ValueError(f"poses must be [B, J, D_out] = [B, {J}, {D_out}], got {got}")
        B, J = poses.shape[:2]
        present = one_hot(length(poses).argmax(1), J) if labels is None else present_classes(labels, B, J)
        chosen = poses * present[..., None]
        return self.layers(chosen.flatten(1)).unflatten(1, self.image_shape)
