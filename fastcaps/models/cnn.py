"""The convolutional baseline of Sabour et al. (2017)."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcaps._checks import check_number, check_positive
from fastcaps.losses import cross_entropy_loss
from fastcaps.models.network import (
    Network,
    at_least_float32,
    check_image_shape,
    check_images,
    only_labels,
    warn_if_channels_last,
    warn_if_large,
)

LESS = {  # what makes a part of a large network smaller
    "convolutions": "fewer channels",
    "linear layers": "smaller images, fewer channels or fewer units",
}


class CNN(Network):
    """The convolutional baseline of Sabour et al. (2017), section 5: what a capsule network is compared with.

    Convolutions of 5x5 pixels with 256, 256 and 128 channels at stride 1, fully connected layers of 328 and 192 units,
    dropout, and one score per class. With padding it has the 35.4 million parameters of the paper on 28x28 pixels.

    Args:
        image_shape: ``(C, H, W)`` of the images.
        num_classes: J.
        channels: of the convolutions.
        units: of the fully connected layers.
        dropout: probability, before the last layer.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1.

    Example:
        >>> network = CNN((1, 28, 28), 10)
        >>> round(sum(p.numel() for p in network.parameters()) / 1e6, 1)
        35.4
        >>> CNN((1, 8, 8), 10, channels=(4,), units=(8,))(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    kind = "cnn"

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        channels: Sequence[int] = (256, 256, 128),
        units: Sequence[int] = (328, 192),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.image_shape = C, H, W = check_image_shape(image_shape)
        warn_if_channels_last(self.image_shape)
        check_positive(num_classes=num_classes)
        check_number("dropout", dropout)
        check_positive(**{f"channels[{n}]": width for n, width in enumerate(channels)})
        check_positive(**{f"units[{n}]": width for n, width in enumerate(units)})
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([C, *channels]):
            layers += [nn.Conv2d(before, after, 5, padding=2), nn.ReLU()]
        widths = [[C, *channels][-1] * H * W, *units]
        planned = [nn.Linear(*sizes, device="meta") for sizes in itertools.pairwise([*widths, num_classes])]
        warn_if_large({"convolutions": layers, "linear layers": planned}, LESS)
        layers.append(nn.Flatten())
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.scores = nn.Linear(widths[-1], num_classes)
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout))

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[B, J]`` before the softmax, for images ``[B, C, H, W]``.

        Raises:
            TypeError: images have another dtype than the parameters (outside autocast).
            ValueError: shapes do not fit.

        Example:
            >>> CNN((3, 8, 8), 5, channels=(4,), units=(8,))(torch.rand(2, 3, 8, 8)).shape
            torch.Size([2, 5])
        """
        check_images(images, self.image_shape, self.scores.weight)
        return self.scores(self.layers(images))

    def probabilities(self, images: Tensor) -> Tensor:
        """The softmax of the scores, ``[B, J]``, for images ``[B, C, H, W]``.

        Example:
            >>> CNN((3, 8, 8), 5, channels=(4,), units=(8,)).probabilities(torch.rand(2, 3, 8, 8)).shape
            torch.Size([2, 5])
        """
        return self(images).softmax(1)

    def training_loss(
        self,
        images: Tensor,
        labels: Tensor,
        targets: Tensor,
        *,
        loss: str | None = None,
        reconstruction_weight: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and the scores; see :meth:`Network.training_loss`.

        Raises:
            ValueError: another loss, or a reconstruction, is asked for, or there are several classes in an image.

        Example:
            >>> images, labels = torch.rand(2, 3, 8, 8), torch.tensor([[3], [1]])
            >>> network = CNN((3, 8, 8), 5, channels=(4,), units=(8,))
            >>> network.training_loss(images, labels, images[:, None])[0].shape
            torch.Size([])
        """
        if loss not in (None, "cross-entropy") or reconstruction_weight:
            raise ValueError("a CNN is trained with cross-entropy and has no decoder")
        scores = at_least_float32(self(images))
        return cross_entropy_loss(scores, only_labels(labels), class_weights=class_weights), scores

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The class index of the highest score, ``[B]`` int64, for images ``[B, C, H, W]``; no gradient.

        Raises:
            TypeError: images have another dtype than the parameters.
            ValueError: shapes do not fit.

        Example:
            >>> CNN((3, 8, 8), 5, channels=(4,), units=(8,)).eval().predict(torch.rand(2, 3, 8, 8)).shape
            torch.Size([2])
        """
        return self(images).argmax(1)
