"""``fastcaps demo``: a capsule network on real digits, pictures of what it does, and the paper's layer timed."""

import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastcaps.benchmarking import Sizes, Timing, compare, einsum_routing, median_and_p20
from fastcaps.data import Dataset, digits
from fastcaps.measure import saved_bytes
from fastcaps.models import CapsNet
from fastcaps.routing import dynamic_routing
from fastcaps.train import figures

BATCH_SIZE = 64
PAPER = Sizes(B=128, I=1152, J=10, D_in=8, D_out=16)  # Sabour et al. (2017) on MNIST


def run(out: Path, *, epochs: int, rounds: int) -> None:
    """Train, draw and time.

    Args:
        out: folder for the pictures; made if it is not there.
        epochs: passes over the training digits.
        rounds: timing rounds; 0 for none.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    data = digits()
    torch.manual_seed(0)
    # 8x8 images: two 3x3 convolutions leave 4x4 positions, each with 16 capsule types.
    network = CapsNet(
        data.train_images.shape[1:], data.num_classes, stem_channels=64, kernel_size=3, types=16, primary_stride=1
    )
    layer = network.capsules
    console.print(
        f"CapsNet with {sum(p.numel() for p in network.parameters()):,} parameters, {layer.in_capsules} -> "
        f"{layer.out_capsules} capsules, {layer.num_iterations} routing iterations; "
        f"{len(data.train_labels)} training and {len(data.test_labels)} test digits of 8x8 pixels"
    )
    start = time.perf_counter()
    losses, errors = train(network, data, epochs, console)
    console.print(
        f"test error [bold]{errors[-1]:.2f} %[/bold] ({round(errors[-1] * len(data.test_labels) / 100)} of "
        f"{len(data.test_labels)} digits) after {epochs} epochs in {time.perf_counter() - start:.0f} s"
    )
    draw(network, data, losses, errors, out)
    console.print(f"pictures in {out}: training, reconstructions, coupling, perturbations (.png)")
    if rounds:
        B, I, J, D_in, D_out = PAPER
        console.print(f"timing the paper's layer: B={B}, {I} -> {J} capsules, {D_in} -> {D_out}, 3 iterations, float32")
        print_timings(compare(**PAPER._asdict(), rounds=rounds), console)
        poses, weight = torch.randn(B, I, D_in, requires_grad=True), torch.randn(I, J, D_out, D_in, requires_grad=True)
        kept = [saved_bytes(f, poses, weight) / 1e6 for f in (lambda x, w: einsum_routing(x, w, 3), dynamic_routing)]
        console.print(f"kept for the backward beside the inputs: einsum {kept[0]:.1f} MB, fastcaps {kept[1]:.2f} MB")


def train(network: CapsNet, data: Dataset, epochs: int, console: Console) -> tuple[list[float], list[float]]:
    """Adam on the paper's loss; the training loss and the test error in percent, after each epoch."""
    # The paper's weight on the summed error was for 784 pixels: the same share of the loss for an image of any size.
    weight = 0.0005 * 784 / math.prod(network.image_shape)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses, errors = [], []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=epochs)
        for _ in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(data.train_labels)).split(BATCH_SIZE):
                images, labels = data.train_images[batch], data.train_labels[batch]
                loss = network.loss(network(images, labels), images, labels, reconstruction_weight=weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            losses.append(total / len(data.train_labels))
            wrong = network.predict(data.test_images) != data.test_labels
            errors.append(100 * wrong.float().mean().item())
            description = f"training: loss {losses[-1]:.4f}, test error {errors[-1]:.2f} %"
            progress.update(task, advance=1, description=description)
    return losses, errors


def print_timings(timings: list[Timing], console: Console) -> None:
    """A table of times and of their ratio to the fastest alternative in the same run."""
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("ms, median (p20)", "error", "forward", "ratio", "forward\n+ backward", "ratio"):
        table.add_column(column, justify="left" if column.startswith("ms") else "right", no_wrap=True)
    best: dict[str, float] = {}
    for mode in ("forward", "training"):
        others = [t for t in timings if t.name != "fastcaps" and t.forward is not None]
        best[mode] = min(median_and_p20(getattr(t, mode))[0] for t in others)
    for timing in timings:
        cells = [timing.name, f"{max(timing.error, timing.gradient_error):.0e}"]
        for mode, fastest in best.items():
            times = getattr(timing, mode)
            if times is None:
                cells += ["refused", ""]
                continue
            median, p20 = median_and_p20(times)
            cells += [f"{median:.1f} ({p20:.1f})", f"{fastest / median:.2f}"]
        table.add_row(*cells, style="bold" if timing.name == "fastcaps" else None)
    console.print(table)
    for timing in timings:
        if timing.refused:
            console.print(f"not timed: {timing.name}: {timing.refused}")
    console.print(
        f"{torch.get_num_threads()} threads. Error: relative, against float64, the worst of output and gradients. "
        "Median and 20th percentile of rounds that take turns. Ratio: speed against the fastest alternative."
    )


def draw(network: CapsNet, data: Dataset, losses: list[float], errors: list[float], out: Path) -> None:
    """Four pictures: training, reconstructions, coupling and perturbations."""
    epochs = [float(n) for n in range(1, len(losses) + 1)]
    panels = [("training loss", {"": (epochs, losses)}, True), ("test error (%)", {"": (epochs, errors)}, False)]
    images, labels = data.test_images[:12], data.test_labels[:12]
    drawn = {
        "training": figures.curves(panels, "epoch"),
        "reconstructions": figures.reconstructions(network, images, labels),
        "coupling": figures.coupling(network, images[:1], f"a {labels[0]}"),
        "perturbations": figures.perturbations(network, images[:1], labels[:1]),
    }
    for name, figure in drawn.items():
        figure.savefig(out / f"{name}.png", dpi=120)
        plt.close(figure)
