"""Evaluation of a network: test loss and errors, confusion, routing statistics."""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcaps._deprecated import FormerTuple
from fastcaps.functional import length
from fastcaps.layers import CapsuleLayer
from fastcaps.models.network import Network, describe
from fastcaps.routing import dynamic_routing
from fastcaps.train.samples import Samples, load_data
from fastcaps.train.settings import Settings

LISTED = 20  # names of classes in a line
DEAD = 0.1  # m- of the margin loss: an output capsule that no image makes longer than this says nothing


def wrong_of(scores: Tensor, labels: Tensor) -> Tensor:
    """``[B]`` bool: whether the K highest of the scores ``[B, J]`` are other classes than the labels ``[B, K]``."""
    guessed = scores.topk(labels.shape[1], dim=1).indices.sort(1).values
    return (guessed != labels.sort(1).values).any(1)


def confusion_counts(scores: Tensor, labels: Tensor) -> Tensor:
    """How often each class was taken for each other.

    Args:
        scores: ``[N, J]``.
        labels: ``[N, K]``.

    Returns:
        ``[J, J]`` int64: true classes in rows, predicted ones in columns; of K things an image, hits count first.
    """
    J, K = scores.shape[1], labels.shape[1]
    counts = torch.zeros(J, J, dtype=torch.long)
    for true, guess in zip(labels.tolist(), scores.topk(K, 1).indices.tolist(), strict=True):
        hits = set(true) & set(guess)
        for name in hits:
            counts[name, name] += 1
        for a, b in zip(sorted(set(true) - hits), sorted(set(guess) - hits), strict=True):
            counts[a, b] += 1
    return counts


def confusion_lines(scores: Tensor, labels: Tensor, class_names: Sequence[str]) -> list[str]:
    """A table with a line for each class, and one that names the classes that were never predicted.

    Args:
        scores: ``[N, J]``.
        labels: ``[N, K]``.
        class_names: of the first classes; the others are numbers.
    """
    counts = confusion_counts(scores, labels)
    names = [*class_names, *map(str, range(len(class_names), len(counts)))]
    lines = ["class      images   right  most often taken for"]
    for n, row in enumerate(counts):
        mistaken = row.clone()
        mistaken[n] = 0
        other = f"{names[int(mistaken.argmax())]} ({int(mistaken.max())} times)" if mistaken.any() else ""
        lines.append(f"{names[n]:<10} {int(row.sum()):>6}  {int(row[n]):>6}  {other}")
    if missing := never_predicted(class_counts(scores, labels)):
        lines.append(f"never predicted: {list_classes(missing, names)}")
    return lines


def class_counts(scores: Tensor, labels: Tensor) -> Tensor:
    """How often each class is there, and how often it is predicted.

    Args:
        scores: ``[N, J]``.
        labels: ``[N, K]``; the K highest scores are the prediction.

    Returns:
        ``[2, J]`` int64.
    """
    J, K = scores.shape[1], labels.shape[1]
    return torch.stack([found.flatten().bincount(minlength=J) for found in (labels, scores.topk(K, 1).indices)])


def never_predicted(counts: Tensor) -> list[int]:
    """The classes that are there and not once predicted, from :func:`class_counts`."""
    there, predicted = counts
    return ((there > 0) & (predicted == 0)).nonzero()[:, 0].tolist()


def list_classes(classes: Sequence[int], class_names: Sequence[str]) -> str:
    """The names of classes, or their numbers where they have none; of many the first."""
    names = [class_names[n] if n < len(class_names) else str(n) for n in classes[:LISTED]]
    return ", ".join(names) + (f" and {len(classes) - LISTED} more" if len(classes) > LISTED else "")


def routing_statistics(network: Network, images: Tensor) -> dict[str, float]:
    """What the routing of the class capsules does with these images, in a few numbers.

    Per iteration t: ``entropy``, of the coupling over the classes, as a share of log J (1: no decision at all);
    ``agreement``, the scalar product of vote and output, weighted by the coupling; ``change``, the length of
    v_t - v_{t-1}. And ``dead``, the share of output capsules that no image makes longer than 0.1.

    Args:
        network: its parameters are on the images' device.
        images: ``[B, C, H, W]``, a few, in the network's dtype.

    Returns:
        The numbers by name; none for a network without routing.
    """
    trace = network.trace(images)
    if trace is None:
        return {}
    J = trace.coupling.shape[-1]
    numbers = {"dead": float((length(trace.poses) <= DEAD).all(0).float().mean())}
    weighted = (trace.coupling * trace.agreement).sum(-1)
    for t in range(len(trace.entropy)):
        numbers[f"entropy_{t + 1}"] = float(trace.entropy[t].mean()) / math.log(max(J, 2))
        numbers[f"agreement_{t + 1}"] = float(weighted[t].mean())
        numbers[f"change_{t + 1}"] = float(trace.change[t].mean())
    return numbers


@dataclass(frozen=True, eq=False)
class Evaluation(FormerTuple):
    """What :func:`evaluate` returns. N test images, J classes, K things in an image.

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
        settings: of its loss.
        samples: whose test part is used.
    """
    network.eval()
    dtype, options = network.dtype, settings.loss_options()
    total, labels, scores = 0.0, [], []
    for images, own, targets in samples.tests():
        loss, found = network.training_loss(images.to(dtype), own, targets.to(dtype), **options)
        total += float(loss) * len(images)
        labels.append(own.cpu())
        scores.append(found.cpu())
    y, s = torch.cat(labels), torch.cat(scores)
    return Evaluation(total / len(y), 100 * wrong_of(s, y).float().mean().item(), y, s)


def load_for(model: str | os.PathLike[str], settings: Settings) -> tuple[Network, Samples]:
    """A saved network and the data set of the settings for it, both on the GPU if one may be used.

    Images of a folder are scaled to the size that the network takes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be, or the network was made for other images or classes.
    """
    device = "cuda" if settings.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    network = Network.load(model, device)
    if settings.data == "image-folder":
        settings = dataclasses.replace(settings, image_size="x".join(map(str, network.image_shape[1:])))
    data = load_data(settings)
    if data.image_shape != network.image_shape or data.num_classes > network.num_classes:
        raise ValueError(
            f"{os.fspath(model)!r} takes images {network.image_shape} of {network.num_classes} classes, but "
            f"{settings.data} has {data.image_shape} of {data.num_classes}"
        )
    trained_on, names = class_names(model, network.num_classes), list(data.class_names)
    if trained_on and names and trained_on != names:
        raise ValueError(f"{os.fspath(model)!r} knows the classes {', '.join(trained_on)}, not {', '.join(names)}")
    if settings.backend is not None:
        for layer in network.modules():
            if isinstance(layer, CapsuleLayer) and layer.routing is dynamic_routing:
                layer.routing_options["backend"] = settings.backend
    return network, Samples(
        data, dataclasses.replace(settings, model=network.kind).resolved(network.image_shape), device
    )


def class_names(model: str | os.PathLike[str], num_classes: int) -> list[str]:
    """The names of the classes that a model's file says it was trained on; none, where it does not say.

    Raises:
        ValueError: it says something else than a name for each class.
    """
    data = describe(model).get("run", {}).get("data", {})
    names = data.get("class names", []) if isinstance(data, dict) else None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(names) not in (0, num_classes):
        raise ValueError(f"{os.fspath(model)!r} must name each of its {num_classes} classes, or none")
    return names
