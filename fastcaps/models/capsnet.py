"""The capsule network of Sabour et al. (2017), for any image size, channel count and number of classes."""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcaps._checks import check_pair, check_positive
from fastcaps.functional import length
from fastcaps.layers import CapsuleLayer, PrimaryCapsules
from fastcaps.losses import (
    cross_entropy_loss,
    focal_margin_loss,
    margin_loss,
    reconstruction_loss,
    spread_loss,
)
from fastcaps.models.convolutions import default_kernel_sizes, map_size
from fastcaps.models.decoder import Decoder
from fastcaps.models.network import (
    Network,
    at_least_float32,
    check_image_shape,
    check_images,
    only_labels,
    warn_if_channels_last,
    warn_if_large,
)
from fastcaps.routing import RoutingTrace

LESS = {  # what makes a part of a large network smaller
    "convolutions": "fewer stem_channels or types, or a smaller kernel_size",
    "capsule layers": "a larger stem_stride or primary_stride, fewer types, or share_weight='inputs'",
    "decoder": "smaller images, or decoder=False",
}


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


class CapsNet(Network):
    """Convolution, primary capsules, class capsules by routing, and a decoder (Sabour et al. 2017, section 4).

    The defaults are the paper's network.

    Args:
        image_shape: ``(C, H, W)`` of the images.
        num_classes: J.
        stem_channels: channels of the first convolution.
        kernel_size: of both convolutions, in pixels: an int, or a pair (height, width). None: the paper's 9, and along
            an axis where that does not fit 3, or else 1.
        stem_stride: stride of the first convolution, in pixels; an int or a pair.
        padding: of both convolutions, in pixels; an int or a pair.
        types: primary capsule types.
        primary_dim: pose size of the primary capsules.
        primary_stride: stride of the second convolution, in pixels; an int or a pair.
        primary_layout: as ``layout`` in :class:`PrimaryCapsules`.
        primary_eps: as ``eps`` there.
        hidden_capsules: capsule layers between the primary and the class capsules: ``(capsules, pose size)`` of each.
        capsule_dim: D_out, pose size of the class capsules.
        num_iterations: T, of every capsule layer.
        bias: whether the capsule layers learn a bias; without it many classes hardly start to learn.
        decoder: whether to reconstruct the image.
        **layer_options: passed to every :class:`CapsuleLayer`: ``share_weight``, ``detach``, ``backend``, ...

    Raises:
        TypeError: a size is not an int, or not a pair where that is allowed.
        ValueError: a size is below 1, or the image is too small for the kernels.

    Warns:
        UserWarning: the network has more than 50 million parameters, or ``image_shape`` looks like ``(H, W, C)``.

    Example:
        >>> network = CapsNet((1, 28, 28), num_classes=10)
        >>> sum(p.numel() for p in network.parameters())
        8215728
        >>> output = network(torch.rand(2, 1, 28, 28))
        >>> output.lengths.shape, output.reconstruction.shape
        (torch.Size([2, 10]), torch.Size([2, 1, 28, 28]))

        Signals are images of height 1.

        >>> CapsNet((1, 1, 187), num_classes=5)(torch.rand(2, 187)[:, None, None]).lengths.shape
        torch.Size([2, 5])
    """

    former_defaults: ClassVar[dict[str, Any]] = {"bias": False}
    presence_threshold = 0.5  # a length is a probability; in the middle of the margin loss's 0.1 and 0.9

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        stem_channels: int = 256,
        kernel_size: int | tuple[int, int] | None = None,
        stem_stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        types: int = 32,
        primary_dim: int = 8,
        primary_stride: int | tuple[int, int] = 2,
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
        warn_if_channels_last(self.image_shape)
        check_positive(num_classes=num_classes, stem_channels=stem_channels)
        check_positive(types=types, primary_dim=primary_dim, capsule_dim=capsule_dim)
        stem_steps, steps = check_pair("stem_stride", stem_stride, 1), check_pair("primary_stride", primary_stride, 1)
        border = check_pair("padding", padding, 0)
        if kernel_size is None:
            kernel_size = default_kernel_sizes((H, W), stem_steps, border)
            self.config["kernel_size"] = kernel_size  # a file says what it was
        kernel = check_pair("kernel_size", kernel_size, 1)
        rows, columns = map_size((C, H, W), kernel, stem_steps, steps, border)
        self.num_classes = num_classes
        self.stem = nn.Conv2d(C, stem_channels, kernel, stem_steps, border)
        self.primary = PrimaryCapsules(
            stem_channels, types, primary_dim, kernel, steps, border, layout=primary_layout, eps=primary_eps
        )
        sizes = [(types * rows * columns, primary_dim), *hidden_capsules, (num_classes, capsule_dim)]
        shapes = [(I, D_in, J, D_out) for (I, D_in), (J, D_out) in itertools.pairwise(sizes)]
        with torch.device("meta"):  # the count, before memory is asked for
            planned: dict[str, list[nn.Module]] = {
                "convolutions": [self.stem, self.primary],
                "capsule layers": [CapsuleLayer(*shape, **layer_options | {"device": "meta"}) for shape in shapes],
                "decoder": [Decoder(self.image_shape, num_classes, capsule_dim)] if decoder else [],
            }
        warn_if_large(planned, LESS)
        layers = [CapsuleLayer(*shape, num_iterations, **layer_options) for shape in shapes]
        self.hidden, self.capsules = nn.Sequential(*layers[:-1]), layers[-1]
        self.decoder = Decoder(self.image_shape, num_classes, capsule_dim) if decoder else None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> CapsNetOutput:
        """Classify images and reconstruct them.

        Args:
            images: ``[B, C, H, W]`` in [0, 1], dtype of the parameters.
            labels: which capsules the decoder draws, the true ones in training: class indices ``[B]``, or bool
                ``[B, J]`` for several classes in an image, which are drawn together. None: the longest.

        Returns:
            A :class:`CapsNetOutput`.

        Raises:
            TypeError: images have another dtype than the parameters, or labels are neither indices nor bool.
            ValueError: shapes do not fit, or a label is out of range.

        Example:
            >>> network, images = CapsNet((1, 8, 8), 10, kernel_size=3), torch.rand(2, 1, 8, 8)
            >>> network(images).lengths.shape
            torch.Size([2, 10])
            >>> network(images, torch.rand(2, 10) > 0.5).reconstruction.shape
            torch.Size([2, 1, 8, 8])
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
        self,
        output: CapsNetOutput,
        images: Tensor,
        labels: Tensor,
        *,
        reconstruction_weight: float = 0.0005,
        class_weights: Tensor | None = None,
    ) -> Tensor:
        """The paper's loss: margin loss plus 0.0005 times the summed squared reconstruction error; a scalar.

        Args:
            output: what the network returned for ``images`` and ``labels``.
            images: ``[B, C, H, W]``.
            labels: class indices ``[B]``, or bool ``[B, J]``: the labels that the network was called with.
            reconstruction_weight: the paper's weight suits 784 pixels; a smaller image wants a larger one.
            class_weights: ``[J]``, as in :func:`fastcaps.losses.margin_loss`; they leave the reconstruction as it is.

        Raises:
            TypeError: labels are neither indices nor bool, or images are no floating-point tensor.
            ValueError: shapes do not fit, or a label is out of range.

        Example:
            >>> network = CapsNet((1, 8, 8), 10, kernel_size=3)
            >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([3, 7])
            >>> network.loss(network(images, labels), images, labels).shape
            torch.Size([])
        """
        loss = margin_loss(output.lengths, labels, class_weights=class_weights)
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
        class_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of the lengths by :func:`classification_loss` plus that of each reconstruction, and the lengths.

        Of several things in an image each is drawn alone and compared with its own target; :meth:`loss` compares a
        drawing of all with the whole image. Arguments are those of :meth:`Network.training_loss`; the network's own
        loss is the margin loss.

        Example:
            >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([[3], [1]])
            >>> network = CapsNet((1, 8, 8), 10, kernel_size=3)
            >>> loss, lengths = network.training_loss(images, labels, images[:, None], reconstruction_weight=0.0005)
            >>> loss.shape, lengths.shape
            (torch.Size([]), torch.Size([2, 10]))
        """
        poses = self.class_poses(images)
        lengths = length(at_least_float32(poses))
        total = classification_loss(loss or "margin", lengths, labels, class_weights)
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
        """Images ``[B, C, H, W]`` for class capsules ``[B, J, D_out]``.

        Args:
            poses: ``[B, J, D_out]``.
            labels: which capsules are drawn: class indices ``[B]``, or bool ``[B, J]``, all that are True together.
                None: the longest.

        Raises:
            TypeError: labels are neither indices nor bool.
            ValueError: the network has no decoder, shapes do not fit, or a label is out of range.

        Example:
            >>> CapsNet((1, 8, 8), 10, kernel_size=3).reconstruct(torch.randn(2, 10, 16)).shape
            torch.Size([2, 1, 8, 8])
        """
        if self.decoder is None:
            raise ValueError("this network was made with decoder=False: it cannot reconstruct")
        return self.decoder(poses, labels)


def classification_loss(name: str, lengths: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The loss of a name for lengths of class capsules; a scalar.

    Args:
        name: ``"margin"``, ``"spread"``, ``"cross-entropy"`` or ``"focal"``. Cross-entropy takes lengths times 10, as
            lengths below 1 cannot make a softmax sure of anything.
        lengths: ``[B, J]``.
        labels: ``[B, K]`` int64, the classes of the K things in each image; of the losses that know one class in an
            image, K must be 1.
        class_weights: ``[J]``, as in :func:`fastcaps.losses.margin_loss`.

    Raises:
        ValueError: the loss knows one class in an image, and there are more.

    Example:
        >>> classification_loss("margin", torch.rand(2, 5), torch.tensor([[3, 1], [0, 4]])).shape
        torch.Size([])
    """
    if name == "spread":
        return spread_loss(lengths, only_labels(labels), class_weights=class_weights)
    if name == "cross-entropy":
        return cross_entropy_loss(lengths, only_labels(labels), scale=10.0, class_weights=class_weights)
    present = (labels[:, :, None] == torch.arange(lengths.shape[1], device=labels.device)).any(1)
    return (margin_loss if name == "margin" else focal_margin_loss)(lengths, present, class_weights=class_weights)
