"""Comparison of initial weights: test error on the 8x8 digits after 8 epochs, three seeds each.

python benchmarks/initialisation.py    # about 4 minutes on 2 cores
"""

import io

import torch
from rich.console import Console

from fastcaps import CapsNet
from fastcaps.data import digits
from fastcaps.demo import train

EPOCHS, SEEDS = 8, (0, 1, 2)


def main() -> None:
    """Print a line per deviation: the loss and the test error of each seed."""
    data = digits()
    for name, deviation in (("0.01", 0.01), ("1/sqrt(I) = 1/16", 1 / 16), ("1/sqrt(D_in) = 0.35", 8**-0.5), ("1", 1.0)):
        losses, errors = [], []
        for seed in SEEDS:
            torch.manual_seed(seed)
            network = CapsNet((1, 8, 8), data.num_classes, stem_channels=64, kernel_size=3, types=16, primary_stride=1)
            torch.nn.init.normal_(network.capsules.weight, std=deviation)
            loss, error = train(network, data, EPOCHS, Console(file=io.StringIO()))
            losses.append(loss[-1])
            errors.append(error[-1])
        shown = " ".join(f"{error:4.1f}" for error in errors)
        print(f"{name:<20} loss {sum(losses) / len(losses):.3f}  test error {shown} %", flush=True)


if __name__ == "__main__":
    main()
