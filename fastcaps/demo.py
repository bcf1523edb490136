"""``fastcaps demo``: a capsule network on real digits, pictures of what it does, and the paper's layer timed."""

import math
import time
from pathlib import Path

import matplotlib
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from fastcaps.data import Dataset, digits
from fastcaps.models import CapsNet
from fastcaps.routing import dynamic_routing, routing_trace
from fastcaps.timing import Timing, compare, einsum_routing, median_and_p20, saved_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine

BATCH_SIZE = 64
PAPER = (128, 1152, 10, 8, 16)  # B, I, J, D_in, D_out of Sabour et al. (2017) on MNIST


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
    draw_training(losses, errors, out / "training.png")
    draw_reconstructions(network, data, out / "reconstructions.png")
    draw_coupling(network, data, out / "coupling.png")
    draw_perturbations(network, data, out / "perturbations.png")
    console.print(f"pictures in {out}: training, reconstructions, coupling, perturbations (.png)")
    if rounds:
        B, I, J, D_in, D_out = PAPER
        console.print(f"timing the paper's layer: B={B}, {I} -> {J} capsules, {D_in} -> {D_out}, 3 iterations, float32")
        print_timings(compare(PAPER, rounds=rounds), console)
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


def draw_training(losses: list[float], errors: list[float], path: Path) -> None:
    """The training loss and the test error over the epochs, one above the other."""
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(6, 5), layout="constrained")
    epochs = range(1, len(losses) + 1)
    upper.plot(epochs, losses, color="tab:blue")
    upper.set(ylabel="training loss", yscale="log", title="CapsNet on 8x8 digits")
    lower.plot(epochs, errors, color="tab:red")
    lower.set(ylabel="test error (%)", xlabel="epoch", ylim=(0, None))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    _save(figure, path)


def draw_reconstructions(network: CapsNet, data: Dataset, path: Path, count: int = 12) -> None:
    """Test digits above what the decoder makes of their capsules."""
    images = data.test_images[:count]
    with torch.no_grad():
        output = network(images)
    figure, rows = plt.subplots(2, count, figsize=(count * 0.8, 2.2), layout="constrained")
    for column in range(count):
        _show(rows[0, column], images[column])
        _show(rows[1, column], output.reconstruction[column])
        rows[0, column].set_title(f"{data.test_labels[column]}", fontsize=9)
        rows[1, column].set_title(f"{output.lengths[column].argmax()}", fontsize=9)
    figure.suptitle("above: test digits with their label; below: reconstructions with the prediction", fontsize=10)
    _save(figure, path)


def draw_coupling(network: CapsNet, data: Dataset, path: Path) -> None:
    """One test digit: how its input capsules divide their votes among the classes, iteration by iteration."""
    image, layer = data.test_images[:1], network.capsules
    with torch.no_grad():
        poses = network.primary_poses(image)
    trace = routing_trace(poses, layer.weight, num_iterations=layer.num_iterations)
    coupling = trace.coupling[:, 0]  # [T, I, J]
    order = coupling[-1, :, data.test_labels[0]].argsort()
    figure, axes = plt.subplots(
        1, len(coupling) + 1, figsize=(3.2 * len(coupling) + 2, 3.7), layout="constrained",
        width_ratios=[1.2] + [2] * len(coupling),
    )  # fmt: skip
    _show(axes[0], image[0])
    axes[0].set_title(f"a {data.test_labels[0]}")
    highest, J = coupling.max().item(), coupling.shape[2]
    for t, panel in enumerate(axes[1:]):
        shown = panel.imshow(
            coupling[t, order].T.numpy(), aspect="auto", vmin=0, vmax=highest, cmap="viridis", origin="lower"
        )
        panel.set(title=f"iteration {t + 1}\nmean entropy {trace.entropy[t].mean():.3f} nats", xlabel="input capsule")
        panel.set_yticks(range(J))
    axes[1].set_ylabel("class")
    figure.suptitle(f"no decision at all: log {J} = {math.log(J):.3f} nats", fontsize=10)
    figure.colorbar(shown, ax=axes[1:].tolist(), label="coupling coefficient")
    _save(figure, path)


def draw_perturbations(network: CapsNet, data: Dataset, path: Path) -> None:
    """Sabour et al. (2017), figure 4: a row per pose entry, moved by -0.25 .. 0.25 in steps of 0.05, and decoded."""
    image, label = data.test_images[:1], data.test_labels[:1]
    shifts = torch.linspace(-0.25, 0.25, 11)
    with torch.no_grad():
        poses = network(image).poses  # [1, J, D_out]
        J, D_out = poses.shape[1:]
        moved = poses.expand(D_out * len(shifts), J, D_out).clone()
        entry = torch.arange(D_out).repeat_interleave(len(shifts))
        moved[torch.arange(len(moved)), label, entry] += shifts.repeat(D_out)
        images = network.reconstruct(moved, label.expand(len(moved)))
    tight = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    figure, grid = plt.subplots(D_out, len(shifts), figsize=(len(shifts) * 0.6, D_out * 0.6 + 0.6), layout=tight)
    for axes, picture in zip(grid.flat, images, strict=True):
        _show(axes, picture)
    for column, shift in enumerate(shifts):
        grid[0, column].set_title(f"{shift:+.2f}" if shift.abs() > 1e-6 else "0", fontsize=7)
    for row in range(D_out):
        grid[row, 0].set_ylabel(f"{row + 1}", fontsize=7, rotation=0, ha="right", va="center")
    figure.suptitle(f"a {label.item()}: each of its {D_out} pose entries moved", fontsize=10)
    _save(figure, path)


def _show(axes: plt.Axes, image: Tensor) -> None:
    """A picture ``[1, H, W]`` in [0, 1] without ticks."""
    axes.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
