"""Figures of capsule networks and their training, by Matplotlib."""

import math
from collections.abc import Sequence

import matplotlib
import torch
from torch import Tensor

from fastcaps.models import CapsNet

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

SHIFTS = torch.linspace(-0.25, 0.25, 11)  # of a pose entry, in steps of 0.05


@torch.no_grad()
def reconstructions(network: CapsNet, images: Tensor, labels: Tensor | None = None) -> Figure:
    """Images above what the decoder makes of their longest capsules.

    Args:
        network: with a decoder.
        images: ``[B, C, H, W]``.
        labels: ``[B]``, written above the images; None: none.
    """
    output = network(images)
    count = len(images)
    figure, rows = plt.subplots(2, count, figsize=(count * 0.8 + 0.4, 2.2), layout="constrained", squeeze=False)
    for column in range(count):
        picture(rows[0, column], images[column])
        picture(rows[1, column], output.reconstruction[column])
        if labels is not None:
            rows[0, column].set_title(f"{labels[column]}", fontsize=9)
        rows[1, column].set_title(f"{output.lengths[column].argmax()}", fontsize=9)
    figure.suptitle("above: images; below: reconstructions, with the prediction", fontsize=10)
    return figure


@torch.no_grad()
def coupling(network: CapsNet, image: Tensor, what: str = "") -> Figure:
    """How the input capsules of the class capsules divide their votes, iteration by iteration.

    Args:
        network: any.
        image: ``[1, C, H, W]``.
        what: a title for the image.
    """
    trace = network.trace(image)
    shares = trace.coupling[:, 0].cpu()  # [T, I, J]
    order = shares[-1, :, int(trace.poses[0].norm(dim=-1).argmax())].argsort()
    T, _, J = shares.shape
    figure, axes = plt.subplots(
        1, T + 1, figsize=(3.2 * T + 2, 3.7), layout="constrained", width_ratios=[1.2] + [2] * T
    )
    picture(axes[0], image[0])
    axes[0].set_title(what)
    for t, panel in enumerate(axes[1:]):
        shown = panel.imshow(
            shares[t, order].T.numpy(), aspect="auto", vmin=0, vmax=shares.max().item(), cmap="viridis", origin="lower"
        )
        panel.set(title=f"iteration {t + 1}\nmean entropy {trace.entropy[t].mean():.3f} nats", xlabel="input capsule")
        panel.set_yticks(range(J) if J <= 20 else [0, J - 1])
    axes[1].set_ylabel("class")
    figure.suptitle(f"no decision at all: log {J} = {math.log(J):.3f} nats", fontsize=10)
    figure.colorbar(shown, ax=axes[1:].tolist(), label="coupling coefficient")
    return figure


@torch.no_grad()
def perturbations(network: CapsNet, image: Tensor, label: Tensor | None = None) -> Figure:
    """Sabour et al. (2017), figure 4: a row per pose entry, moved by -0.25 .. 0.25 in steps of 0.05, and decoded.

    Args:
        network: with a decoder.
        image: ``[1, C, H, W]``.
        label: ``[1]``, the capsule that is moved; None: the longest.
    """
    poses = network.class_poses(image)  # [1, J, D_out]
    label = poses.norm(dim=-1).argmax(1) if label is None else label
    J, D_out = poses.shape[1:]
    moved = poses.expand(D_out * len(SHIFTS), J, D_out).clone()
    entry = torch.arange(D_out).repeat_interleave(len(SHIFTS))
    moved[torch.arange(len(moved)), label, entry] += SHIFTS.to(moved).repeat(D_out)
    drawn = network.reconstruct(moved, label.expand(len(moved)))
    tight = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    size = (len(SHIFTS) * 0.6, D_out * 0.6 + 0.6)
    figure, grid = plt.subplots(D_out, len(SHIFTS), figsize=size, layout=tight, squeeze=False)
    for axes, one in zip(grid.flat, drawn, strict=True):
        picture(axes, one)
    for column, shift in enumerate(SHIFTS):
        grid[0, column].set_title(f"{shift:+.2f}" if shift.abs() > 1e-6 else "0", fontsize=7)
    for row in range(D_out):
        grid[row, 0].set_ylabel(f"{row + 1}", fontsize=7, rotation=0, ha="right", va="center")
    figure.suptitle(f"class {label.item()}: each of its {D_out} pose entries moved", fontsize=10)
    return figure


def curves(panels: Sequence[tuple[str, dict[str, tuple[list[float], list[float]]], bool]], xlabel: str) -> Figure:
    """Lines over the course of training.

    Args:
        panels: of each the label of its y axis, its lines by name as (x, y), and whether y is logarithmic.
        xlabel: of all.
    """
    count = len(panels)
    figure, axes = plt.subplots(count, 1, sharex=True, figsize=(7.5, 2.3 * count + 0.5), layout="constrained")
    for panel, (ylabel, lines, logarithmic) in zip([axes] if count == 1 else axes, panels, strict=True):
        for name, (x, y) in lines.items():
            panel.plot(x, y, label=name, marker="o" if len(x) < 40 else None, markersize=3, linewidth=1.2)
        panel.set(ylabel=ylabel, yscale="log" if logarithmic else "linear")
        if len(lines) > 1:
            panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    panel.set(xlabel=xlabel)
    return figure


def confusion(counts: Tensor) -> Figure:
    """How often each class was taken for each other; ``counts`` is ``[J, J]``: rows are true, columns predicted."""
    J = len(counts)
    side = min(0.45 * J, 12)  # inches; beyond that a class gets less room
    figure, axes = plt.subplots(figsize=(side + 2, side + 1.5), layout="constrained")
    wrong = counts.clone().fill_diagonal_(0)
    axes.imshow(wrong.numpy(), cmap="Reds", vmin=0, vmax=max(1, int(wrong.max())))
    if J <= 20:
        for row in range(J):
            for column in range(J):
                if counts[row, column]:
                    axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(J))
        axes.set_yticks(range(J))
    axes.set(xlabel="predicted", ylabel="true")
    return figure


def pictures(images: Tensor, titles: Sequence[str], columns: int = 10) -> Figure:
    """Images ``[B, C, H, W]`` in rows, with a title each."""
    rows = -(-len(images) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(columns * 0.95, rows * 1.15), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, title in zip(grid.flat, images, titles, strict=False):
        axes.axis("on")
        picture(axes, image)
        axes.set_title(title, fontsize=7)
    return figure


def picture(axes: plt.Axes, image: Tensor) -> None:
    """A picture ``[C, H, W]`` in [0, 1] without ticks; of one or three channels."""
    pixels = image.detach().cpu().float()
    if len(pixels) == 3:
        axes.imshow(pixels.movedim(0, 2).clamp(0, 1).numpy())
    else:
        axes.imshow(pixels[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
