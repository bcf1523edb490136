"""How well a network does: its loss on a batch, its errors on a test set, and what its routing does."""

import dataclasses
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from fastcaps import losses
from fastcaps.functional import length
from fastcaps.layers import CapsuleLayer
from fastcaps.models import CNN, CapsNet
from fastcaps.models.network import Network, describe
from fastcaps.train.samples import Samples, image_shape, load_data, single
from fastcaps.train.settings import Settings

DEAD = 0.1  # m- of the margin loss: an output capsule that no image makes longer than this says nothing


def classification_loss(name: str, scores: Tensor, labels: Tensor) -> Tensor:
    """The loss of the settings' name for scores ``[B, J]`` (lengths of capsules) and labels ``[B, K]``.

    Cross-entropy takes lengths times 10, as lengths below 1 cannot make a softmax sure of anything.
    """
    if name == "spread":
        return losses.spread_loss(scores, labels[:, 0])
    if name == "cross-entropy":
        return losses.cross_entropy_loss(scores, labels[:, 0], scale=10.0)
    present = (labels[:, :, None] == torch.arange(scores.shape[1], device=labels.device)).any(1)
    return (losses.margin_loss if name == "margin" else losses.focal_margin_loss)(scores, present)


def network_loss(
    network: Network, settings: Settings, images: Tensor, labels: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, a scalar, and the scores ``[B, J]``; arguments as :class:`Samples` gives them."""
    if isinstance(network, CNN):
        scores = network(images).float() if images.dtype != torch.float64 else network(images)
        return losses.cross_entropy_loss(scores, labels[:, 0]), scores
    assert isinstance(network, CapsNet)
    poses = network.class_poses(images)
    wide = poses if poses.dtype == torch.float64 else poses.float()  # a loss in bfloat16 would have two digits
    scores = length(wide)
    loss = classification_loss(settings.loss or "margin", scores, labels)
    if network.decoder is not None:
        for k in range(labels.shape[1]):
            drawn = network.reconstruct(poses, labels[:, k])
            loss = loss + losses.reconstruction_loss(
                drawn.to(targets.dtype), targets[:, k], weight=settings.reconstruction or 0.0
            )
    return loss, scores


def wrong_of(scores: Tensor, labels: Tensor) -> Tensor:
    """``[B]`` bool: whether the K highest of the scores ``[B, J]`` are other classes than the labels ``[B, K]``."""
    guessed = scores.topk(labels.shape[1], dim=1).indices.sort(1).values
    return (guessed != labels.sort(1).values).any(1)


@torch.no_grad()
def routing_statistics(network: CapsNet, images: Tensor) -> dict[str, float]:
    """What the routing of the class capsules does with these images, in a few numbers.

    Per iteration t: ``entropy``, of the coupling over the classes, as a share of log J (1: no decision at all);
    ``agreement``, the scalar product of vote and output, weighted by the coupling; ``change``, the length of
    v_t - v_{t-1}. And ``dead``, the share of output capsules that no image makes longer than 0.1.

    Args:
        network: its parameters are on the images' device.
        images: ``[B, C, H, W]``, a few.
    """
    trace = network.capsules.trace(network.hidden(network.primary_poses(images)))
    J = trace.coupling.shape[-1]
    numbers = {"dead": float((length(trace.poses) <= DEAD).all(0).float().mean())}
    weighted = (trace.coupling * trace.agreement).sum(-1)
    for t in range(len(trace.entropy)):
        numbers[f"entropy_{t + 1}"] = float(trace.entropy[t].mean()) / math.log(max(J, 2))
        numbers[f"agreement_{t + 1}"] = float(weighted[t].mean())
        numbers[f"change_{t + 1}"] = float(trace.change[t].mean())
    return numbers


class Evaluation(NamedTuple):
    """What :func:`evaluate` returns; N test images, J classes, K things in an image.

    Attributes:
        loss: mean over the images, a float.
        error: in percent, of images with any wrong class.
        labels: ``[N, K]``.
        scores: ``[N, J]``, lengths of the capsules, or scores of the baseline.
    """

    loss: float
    error: float
    labels: Tensor
    scores: Tensor


@torch.no_grad()
def evaluate(network: Network, settings: Settings, samples: Samples) -> Evaluation:
    """Test a network.

    Args:
        network: on the device of the samples.
        settings: resolved.
        samples: whose test part is used.
    """
    network.eval()
    dtype = next(network.parameters()).dtype
    total, labels, scores = 0.0, [], []
    for images, own, targets in samples.tests():
        loss, found = network_loss(network, settings, images.to(dtype), own, targets.to(dtype))
        total += float(loss) * len(images)
        labels.append(own.cpu())
        scores.append(found.cpu())
    y, s = torch.cat(labels), torch.cat(scores)
    return Evaluation(total / len(y), 100 * wrong_of(s, y).float().mean().item(), y, s)


def load_for(model: str | os.PathLike[str], settings: Settings) -> tuple[Network, Samples]:
    """A saved network and the data set of the settings for it, both on the GPU if one may be used.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be, or the network was made for other images or classes.
    """
    device = "cuda" if settings.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    network = Network.load(model, device)
    data = load_data(settings)
    if image_shape(data) != network.image_shape or data.num_classes > network.num_classes:
        raise ValueError(
            f"{os.fspath(model)!r} takes images {network.image_shape} of {network.num_classes} classes, but "
            f"{settings.data} has {image_shape(data)} of {data.num_classes}"
        )
    trained_on = describe(model).get("run", {}).get("data", {}).get("class names", [])
    names = list(single(data).class_names)
    if trained_on and names and trained_on != names:
        raise ValueError(f"{os.fspath(model)!r} knows the classes {', '.join(trained_on)}, not {', '.join(names)}")
    if settings.backend is not None:
        for layer in network.modules():
            if isinstance(layer, CapsuleLayer):
                layer.routing_options["backend"] = settings.backend
    kind = "cnn" if isinstance(network, CNN) else "capsnet"
    return network, Samples(data, dataclasses.replace(settings, model=kind).resolved(network.image_shape), device)
