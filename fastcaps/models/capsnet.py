"""The capsule network of Sabour et al. (2017), for any image size, channel count and number of classes."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcaps._checks import check_labels, check_positive
from fastcaps._deprecated import warn_renamed
from fastcaps.functional import length
from fastcaps.layers import CapsuleLayer, PrimaryCapsules
from fastcaps.losses import (
    cross_entropy_loss,
    focal_margin_loss,
    margin_loss,
    one_hot,
    reconstruction_loss,
    spread_loss,
)
from fastcaps.models.network import Network, at_least_float32, check_image_shape, check_images
from fastcaps.routing import RoutingTrace


class CapsNetOutput(NamedTuple):
    """What :class:`CapsNet` returns.

    Attributes:
        lengths: ``[B, J]``, the probability that each class is present.
        poses: ``[B, J, D_out]``, the class capsules.
        reconstruction: ``[B, C, H, W]`` in [0, 1], or None for a network without decoder.
    """

    lengths: Tensor
    poses: Tensor
    reconstruction: Tensor | None


# Without a name of its own an exported network cannot be saved.
torch.utils._pytree._register_namedtuple(CapsNetOutput, serialized_type_name="fastcaps.models.CapsNetOutput")


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
    """Draws the image that one class capsule stands for (Sabour et al. 2017, figure 2).

    Args:
        image_shape: ``(C, H, W)``.
        num_classes: J.
        capsule_dim: D_out.
        hidden: widths of the hidden layers.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1.

    Example:
        >>> Decoder((1, 28, 28), 10, 16)(torch.randn(2, 10, 16), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 28, 28])
    """

    @_order_of_0_1
    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        capsule_dim: int,
        hidden: tuple[int, ...] = (512, 1024),
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
        """Draw one capsule of each sample; all others are set to 0 first.

        Args:
            poses: ``[B, J, D_out]``, dtype of the parameters.
            labels: class indices ``[B]``: which capsule is drawn; None: the longest.

        Returns:
            Images ``[B, C, H, W]`` in [0, 1].

        Raises:
            TypeError: labels are not indices.
            ValueError: shapes do not fit, or a label is out of range.

        Example:
            >>> Decoder((1, 8, 8), 10, 16)(torch.randn(2, 10, 16)).shape
            torch.Size([2, 1, 8, 8])
        """
        if not isinstance(poses, Tensor) or poses.dim() != 3 or poses.shape[1:] != self.poses_shape:
            got = tuple(poses.shape) if isinstance(poses, Tensor) else type(poses).__name__
            J, D_out = self.poses_shape
            raise ValueError(f"poses must be [B, J, D_out] = [B, {J}, {D_out}], got {got}")
        if labels is None:
            labels = length(poses).argmax(1)
        else:
            check_labels(labels, *poses.shape[:2])
        chosen = poses * one_hot(labels, poses.shape[1])[..., None]
        return self.layers(chosen.flatten(1)).unflatten(1, self.image_shape)


class CapsNet(Network):
    """Convolution, primary capsules, class capsules by routing, and a decoder (Sabour et al. 2017, section 4).

    The defaults are the paper's network.

    Args:
        image_shape: ``(C, H, W)`` of the images.
        num_classes: J.
        stem_channels: channels of the first convolution.
        kernel_size: of both convolutions, in pixels.
        types: primary capsule types.
        primary_dim: pose size of the primary capsules.
        primary_stride: stride of the second convolution, in pixels.
        primary_layout: as ``layout`` in :class:`PrimaryCapsules`.
        primary_eps: as ``eps`` there.
        hidden_capsules: capsule layers between the primary and the class capsules: ``(capsules, pose size)`` of each.
        capsule_dim: D_out, pose size of the class capsules.
        num_iterations: T, of every capsule layer.
        bias: whether the capsule layers learn a bias; without it many classes hardly start to learn.
        decoder: whether to reconstruct the image.
        **layer_options: passed to every :class:`CapsuleLayer`: ``share_weight``, ``detach``, ``backend``, ...

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, or the image is too small for the kernels.

    Example:
        >>> network = CapsNet((1, 28, 28), num_classes=10)
        >>> sum(p.numel() for p in network.parameters())
        8215728
        >>> output = network(torch.rand(2, 1, 28, 28))
        >>> output.lengths.shape, output.reconstruction.shape
        (torch.Size([2, 10]), torch.Size([2, 1, 28, 28]))
    """

    former_defaults: ClassVar[dict[str, Any]] = {"bias": False}

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        stem_channels: int = 256,
        kernel_size: int = 9,
        types: int = 32,
        primary_dim: int = 8,
        primary_stride: int = 2,
        primary_layout: str = "capsule-major",
        primary_eps: float = 0.0,
        hidden_capsules: Sequence[tuple[int, int]] = (),
        capsule_dim: int = 16,
        num_iterations: int = 3,
        bias: bool = True,
        decoder: bool = True,
        **layer_options: Any,
    ) -> None:
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.config |= self.config.pop("layer_options")
        layer_options["bias"] = bias
        self.image_shape = C, H, W = check_image_shape(image_shape)
        check_positive(num_classes=num_classes, stem_channels=stem_channels, kernel_size=kernel_size)
        check_positive(types=types, primary_dim=primary_dim, primary_stride=primary_stride, capsule_dim=capsule_dim)
        smallest = 2 * kernel_size - 1
        if min(H, W) < smallest:
            raise ValueError(
                f"image_shape {(C, H, W)} is too small for two convolutions of kernel_size {kernel_size}: "
                f"height and width must be at least {smallest}"
            )
        self.num_classes = num_classes
        self.stem = nn.Conv2d(C, stem_channels, kernel_size)
        self.primary = PrimaryCapsules(
            stem_channels, types, primary_dim, kernel_size, primary_stride, layout=primary_layout, eps=primary_eps
        )
        rows, columns = ((size - smallest) // primary_stride + 1 for size in (H, W))
        I, D_in = types * rows * columns, primary_dim
        self.hidden = nn.Sequential()
        for J, D_out in hidden_capsules:
            self.hidden.append(CapsuleLayer(I, D_in, J, D_out, num_iterations, **layer_options))
            I, D_in = J, D_out
        self.capsules = CapsuleLayer(I, D_in, num_classes, capsule_dim, num_iterations, **layer_options)
        self.decoder = Decoder(self.image_shape, num_classes, capsule_dim) if decoder else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> CapsNetOutput:
        """Classify images and reconstruct them.

        Args:
            images: ``[B, C, H, W]`` in [0, 1], dtype of the parameters.
            labels: class indices ``[B]``: which capsule the decoder draws, the true one in training. None: the longest.

        Returns:
            A :class:`CapsNetOutput`.

        Raises:
            TypeError: images have another dtype than the parameters, or labels are not indices.
            ValueError: shapes do not fit, or a label is out of range.

        Example:
            >>> CapsNet((1, 8, 8), 10, kernel_size=3)(torch.rand(2, 1, 8, 8)).lengths.shape
            torch.Size([2, 10])
        """
        poses = self.class_poses(images)
        lengths = length(poses)
        reconstruction = None
        if self.decoder is not None:
            reconstruction = self.decoder(poses, labels)
        return CapsNetOutput(lengths, poses, reconstruction)

    def class_poses(self, images: Tensor) -> Tensor:
        """The class capsules ``[B, J, D_out]`` alone, from images ``[B, C, H, W]``.

        Raises:
            TypeError: images have another dtype than the parameters (outside autocast).
            ValueError: shapes do not fit.

        Example:
            >>> CapsNet((1, 8, 8), 10, kernel_size=3).class_poses(torch.rand(2, 1, 8, 8)).shape
            torch.Size([2, 10, 16])
        """
        return self.capsules(self.hidden(self.primary_poses(images)))

    def primary_poses(self, images: Tensor) -> Tensor:
        """The poses ``[B, I, D_in]`` of the primary capsules, from images ``[B, C, H, W]``.

        Raises:
            TypeError: images have another dtype than the parameters (outside autocast).
            ValueError: shapes do not fit.

        Example:
            >>> CapsNet((1, 8, 8), 10, kernel_size=3).primary_poses(torch.rand(2, 1, 8, 8)).shape
            torch.Size([2, 128, 8])
        """
        check_images(images, self.image_shape, self.stem.weight)
        return self.primary(F.relu(self.stem(images)))

    def loss(
        self, output: CapsNetOutput, images: Tensor, labels: Tensor, *, reconstruction_weight: float = 0.0005
    ) -> Tensor:
        """The paper's loss: margin loss plus 0.0005 times the summed squared reconstruction error; a scalar.

        Args:
            output: what the network returned for ``images`` and ``labels``.
            images: ``[B, C, H, W]``.
            labels: class indices ``[B]``.
            reconstruction_weight: the paper's weight suits 784 pixels; a smaller image wants a larger one.

        Raises:
            TypeError: labels are not indices, or images are no floating-point tensor.
            ValueError: shapes do not fit, or a label is out of range.

        Example:
            >>> network = CapsNet((1, 8, 8), 10, kernel_size=3)
            >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([3, 7])
            >>> network.loss(network(images, labels), images, labels).shape
            torch.Size([])
        """
        loss = margin_loss(output.lengths, labels)
        if output.reconstruction is not None:
            loss = loss + reconstruction_loss(output.reconstruction, images, weight=reconstruction_weight)
        return loss

    def probabilities(self, images: Tensor) -> Tensor:
        """The lengths of the class capsules, ``[B, J]``, for images ``[B, C, H, W]``.

        Example:
            >>> CapsNet((1, 8, 8), 10, kernel_size=3).probabilities(torch.rand(2, 1, 8, 8)).shape
            torch.Size([2, 10])
        """
        return length(self.class_poses(images))

    def training_loss(
        self,
        images: Tensor,
        labels: Tensor,
        targets: Tensor,
        *,
        loss: str | None = None,
        reconstruction_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The loss of the lengths by :func:`classification_loss` plus that of each reconstruction, and the lengths.

        Arguments are those of :meth:`Network.training_loss`; the network's own loss is the margin loss.

        Example:
            >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([[3], [1]])
            >>> network = CapsNet((1, 8, 8), 10, kernel_size=3)
            >>> loss, lengths = network.training_loss(images, labels, images[:, None], reconstruction_weight=0.0005)
            >>> loss.shape, lengths.shape
            (torch.Size([]), torch.Size([2, 10]))
        """
        poses = self.class_poses(images)
        lengths = length(at_least_float32(poses))
        total = classification_loss(loss or "margin", lengths, labels)
        if self.decoder is not None:
            for k in range(labels.shape[1]):
                drawn = self.reconstruct(poses, labels[:, k]).to(targets.dtype)
                total = total + reconstruction_loss(drawn, targets[:, k], weight=reconstruction_weight)
        return total, lengths

    def trace(self, images: Tensor) -> RoutingTrace:
        """What the routing of the class capsules does with images ``[B, C, H, W]`` in every iteration; no gradient.

        Raises:
            TypeError: images have another dtype than the parameters, or the layer routes by a function of one's own.
            ValueError: shapes do not fit.

        Example:
            >>> CapsNet((1, 8, 8), 10, kernel_size=3).trace(torch.rand(2, 1, 8, 8)).coupling.shape
            torch.Size([3, 2, 128, 10])
        """
        with torch.no_grad():
            return self.capsules.trace(self.hidden(self.primary_poses(images)))

    def summary(self) -> str:
        """Kind and sizes in a few words."""
        layer = self.capsules
        sizes = f"{layer.in_capsules} -> {layer.out_capsules} capsules, {layer.num_iterations} routing iterations"
        return f"{super().summary()}, {sizes}"

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The class index of the longest capsule, ``[B]`` int64, for images ``[B, C, H, W]``; no gradient.

        Raises:
            TypeError: images have another dtype than the parameters.
            ValueError: shapes do not fit.

        Example:
            >>> CapsNet((1, 8, 8), 10, kernel_size=3).predict(torch.rand(2, 1, 8, 8)).shape
            torch.Size([2])
        """
        return length(self.class_poses(images)).argmax(1)

    def reconstruct(self, poses: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images ``[B, C, H, W]`` for class capsules ``[B, J, D_out]``: of the labelled ones, or of the longest.

        Raises:
            TypeError: labels are not indices.
            ValueError: the network has no decoder, shapes do not fit, or a label is out of range.

        Example:
            >>> CapsNet((1, 8, 8), 10, kernel_size=3).reconstruct(torch.randn(2, 10, 16)).shape
            torch.Size([2, 1, 8, 8])
        """
        if self.decoder is None:
            raise ValueError("this network was made with decoder=False: it cannot reconstruct")
        return self.decoder(poses, labels)


def classification_loss(name: str, lengths: Tensor, labels: Tensor) -> Tensor:
    """The loss of a name for lengths of class capsules; a scalar.

    Args:
        name: ``"margin"``, ``"spread"``, ``"cross-entropy"`` or ``"focal"``. Cross-entropy takes lengths times 10, as
            lengths below 1 cannot make a softmax sure of anything.
        lengths: ``[B, J]``.
        labels: ``[B, K]`` int64, the classes of the K things in each image.

    Example:
        >>> classification_loss("margin", torch.rand(2, 5), torch.tensor([[3, 1], [0, 4]])).shape
        torch.Size([])
    """
    if name == "spread":
        return spread_loss(lengths, labels[:, 0])
    if name == "cross-entropy":
        return cross_entropy_loss(lengths, labels[:, 0], scale=10.0)
    present = (labels[:, :, None] == torch.arange(lengths.shape[1], device=labels.device)).any(1)
    return (margin_loss if name == "margin" else focal_margin_loss)(lengths, present)
