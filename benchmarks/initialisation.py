"""Initial weights and biases of the capsule layer beside each other, on 10, 100 and 1000 classes, three seeds each.

python benchmarks/initialisation.py               # about an hour on one core; goes on where it stopped
python benchmarks/initialisation.py mnist --root DIR
python benchmarks/initialisation.py --lengths     # seconds: initial lengths for a deviation with another power of J
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import description
from torch import Tensor, nn

from fastcaps import CapsNet, CapsuleLayer
from fastcaps.data import Dataset, digits, mnist, multi_digit
from fastcaps.losses import margin_loss

RESULTS = Path(__file__).parent / "results" / "initialisation.json"
SEEDS, BATCH, PARTS = (0, 1, 2), 32, 5  # the loss is averaged over each of so many parts of a run
TESTS = 400  # images
NORM = 1 / 3  # of a bias: length 0.1


def memorised(data: Dataset) -> Dataset:
    """The same with the training images as test images."""
    return dataclasses.replace(data, test_images=data.train_images, test_labels=data.train_labels)


class Case(NamedTuple):
    """A data set, its network and its budget."""

    data: Callable[[Path], Dataset]
    steps: int
    network: dict[str, Any]


SMALL = {"kernel_size": 3, "types": 2, "capsule_dim": 8, "decoder": False}
CASES = {
    "digits": Case(lambda root: digits(), 500, {"kernel_size": 3, "types": 8, "primary_stride": 1}),
    "mnist": Case(mnist, 200, {"types": 4}),
    "digits-100": Case(lambda root: multi_digit(2), 400, {"kernel_size": 3, "types": 8, "decoder": False}),
    "digits-1000": Case(lambda root: multi_digit(3), 150, SMALL | {"capsule_dim": 16}),
    "digits-1000-long": Case(lambda root: multi_digit(3), 1500, SMALL | {"capsule_dim": 16}),
    "64 of digits-1000": Case(lambda root: memorised(multi_digit(3, num_train=64)), 150, SMALL),
}

LONG = ("digits-1000-long",)  # run where it is named only


class Start(NamedTuple):
    """The deviation of the weight for I, J and D_out, and the bias: none, equal entries, or random directions."""

    deviation: Callable[[int, int, int], float]
    bias: str = ""


STARTS = {
    "1/sqrt(I)": Start(lambda I, J, D: I**-0.5),
    "J/(10 sqrt(I))": Start(lambda I, J, D: J / 10 * I**-0.5),
    "sqrt(J/(I D_out))": Start(lambda I, J, D: math.sqrt(J / (I * D))),
    "1/sqrt(I), bias": Start(lambda I, J, D: I**-0.5, "random"),
    "sqrt(J/(I D_out)), bias": Start(lambda I, J, D: math.sqrt(J / (I * D)), "random"),
    "sqrt(J/(I D_out)), equal bias": Start(lambda I, J, D: math.sqrt(J / (I * D)), "equal"),
    "min(J/(10 sqrt(I)), 0.3), bias": Start(lambda I, J, D: min(J / 10 * I**-0.5, 0.3), "random"),
}


def started(case: Case, data: Dataset, start: Start, seed: int) -> CapsNet:
    """The network: with one seed all starts share stem, primary capsules and the directions of the weight."""
    torch.manual_seed(seed)
    network = CapsNet(data.image_shape, data.num_classes, stem_channels=32, bias=bool(start.bias), **case.network)
    layer = network.capsules
    torch.manual_seed(1000 + seed)
    nn.init.normal_(layer.weight, std=start.deviation(layer.in_capsules, layer.out_capsules, layer.out_dim))
    if layer.bias is not None:
        directions = torch.randn_like(layer.bias) if start.bias == "random" else torch.ones_like(layer.bias)
        with torch.no_grad():
            layer.bias.copy_(NORM * nn.functional.normalize(directions, dim=1))
    return network


@torch.no_grad()
def test(network: CapsNet, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Error in percent and margin loss."""
    lengths = torch.cat([network.probabilities(part) for part in images.split(100)])
    return 100 * (lengths.argmax(1) != labels).float().mean().item(), margin_loss(lengths, labels).item()


def run(case: Case, data: Dataset, start: Start, seed: int) -> dict[str, Any]:
    """Adam for a number of steps, on the same batches for each start."""
    network = started(case, data, start, seed)
    weight = 0.0005 * 784 / math.prod(network.image_shape)  # of the reconstruction, as the demo has it
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    images, labels = data.test_images[:TESTS], data.test_labels[:TESTS]
    lengths = network.probabilities(images[:100])
    row: dict[str, Any] = {"first loss": test(network, images, labels)[1], "first length": lengths.mean().item()}
    losses = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(case.steps):
        batch = torch.randint(data.num_train, (BATCH,), generator=generator)
        x, y = data.train_images[batch], data.train_labels[batch]
        output = network(x, y)
        loss = network.loss(output, x, y, reconstruction_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(margin_loss(output.lengths.detach(), y).item())
    part = case.steps // PARTS
    row["test error"], row["test loss"] = test(network, images, labels)
    row = {name: float(f"{value:.4g}") for name, value in row.items()}
    return row | {"margin loss": [round(statistics.mean(losses[n * part :][:part]), 4) for n in range(PARTS)]}


@torch.no_grad()
def lengths() -> None:
    """Mean initial lengths with the default bias, where the deviation is J^power / sqrt(I D_out)."""
    print("| J | I | T, length of the inputs | power 0.5 (default) | 0.6 | 0.75 | 1 |\n|" + " --- |" * 7)
    for (J, I), (T, r) in itertools.product([(100, 512), (1000, 72), (1000, 512)], [(3, 0.9), (5, 0.9), (5, 0.3)]):
        cells = []
        for power in (0.5, 0.6, 0.75, 1.0):
            torch.manual_seed(0)
            layer = CapsuleLayer(I, 8, J, 16, num_iterations=T, bias=True)
            layer.weight *= J ** (power - 0.5)
            poses = r * nn.functional.normalize(torch.randn(4, I, 8), dim=2)
            cells.append(f"{layer(poses).norm(dim=2).mean():.2f}")
        print(f"| {J} | {I} | {T}, {r} | {' | '.join(cells)} |")


def show(results: dict[str, Any]) -> None:
    """A table for each data set: means over the seeds, and the test error of each."""
    for name in CASES:
        rows = {start: [r for key, r in results.items() if key.startswith(f"{name}; {start}; ")] for start in STARTS}
        print(f"\n{name}: start, length, loss at first, margin loss in fifths of the run, test error (%)")
        for start, runs in ((start, runs) for start, runs in rows.items() if runs):
            mean = [statistics.mean(values) for values in zip(*(r["margin loss"] for r in runs), strict=True)]
            first = statistics.mean(r["first loss"] for r in runs)
            length = statistics.mean(r["first length"] for r in runs)
            course = ", ".join(f"{value:.3f}" for value in mean)
            errors = ", ".join(f"{r['test error']:.1f}" for r in runs)
            print(f"| {start} | {length:.2g} | {first:.2f} | {course} | {errors} |")


def main() -> None:
    """Run what is not in the result file yet, write each row when it is there, and show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases", nargs="*", default=[name for name in CASES if name not in LONG], metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder with MNIST")
    parser.add_argument("--starts", nargs="*", choices=list(STARTS), metavar="START", help="; ".join(STARTS))
    parser.add_argument("--lengths", action="store_true", help="print initial lengths, and train nothing")
    arguments = parser.parse_args()
    if arguments.lengths:
        return lengths()
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": description(), "runs": {}}
    for name in arguments.cases:
        data = CASES[name].data(arguments.root)
        for seed, start in itertools.product(SEEDS, arguments.starts or STARTS):
            key = f"{name}; {start}; seed {seed}"
            if key not in content["runs"]:
                content["runs"][key] = run(CASES[name], data, STARTS[start], seed)
                RESULTS.write_text(json.dumps(content, indent=1) + "\n")
                print(f"{key}: {content['runs'][key]}", flush=True)
    show(content["runs"])


if __name__ == "__main__":
    main()
