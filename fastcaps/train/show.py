"""A page of what a network makes of images: ``fastcaps show``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastcaps.data import read_image
from fastcaps.models.network import Network
from fastcaps.train import figures
from fastcaps.train.evaluation import class_names
from fastcaps.train.report import Section, network_sections, write_page

BEST = 3  # classes that are named for each image


def show(model: Path, images: Sequence[Path], out: Path) -> list[str]:
    """Write a page of what a network makes of images, and describe each in a line.

    Args:
        model: its file.
        images: pictures of any size; they are made as large as the network wants, and grey if it wants grey.
        out: the page.

    Returns:
        A line for each image with its likeliest classes and their probabilities, and one that names the page. A line
        says that no class is present where none reaches :attr:`Network.presence_threshold`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is not what it should be.
        OSError: the page cannot be written.
    """
    network = Network.load(model).eval()
    C, H, W = network.image_shape
    pictures = torch.stack([read_image(path, C, (H, W)) for path in images]).to(network.dtype)
    with torch.no_grad():
        probabilities = network.probabilities(pictures)
    names = class_names(model, network.num_classes) or range(network.num_classes)
    lines, titles = [], []
    for path, row in zip(images, probabilities, strict=True):
        best = row.topk(min(BEST, len(row)))
        found = [(names[n], value) for value, n in zip(*map(Tensor.tolist, best), strict=True)]
        absent = network.presence_threshold is not None and found[0][1] < network.presence_threshold
        start = f"no class is present, as all are below {network.presence_threshold}: " if absent else ""
        lines.append(f"{path}: {start}" + ", ".join(f"{name} ({value:.3f})" for name, value in found))
        titles.append(f"{path.name}: {'no class' if absent else found[0][0]}")
    sections = [Section("Images", "As the network sees them.", [figures.pictures(pictures, titles)])]
    for n, path in enumerate(images):
        for section in network_sections(network, pictures[n : n + 1]):
            sections.append(dataclasses.replace(section, heading=f"{path.name}: {section.heading}"))
    write_page(out, f"{model}", sections)
    return [*lines, f"{out} is written"]
