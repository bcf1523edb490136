"""Runs of the trainer in tests: small ones, and what they leave."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from fastcaps import cli
from fastcaps.train.report import read_log

# A small network on 1,438 digits: 11 steps an epoch.
SMALL = ["--stem", "8", "--types", "2", "--capsule-dim", "4", "--epochs", "3", "--accelerator", "cpu"]
SMALL += ["--checkpoint-seconds", "4", "--schedule", "cosine"]
TINY = ["--stem", "4", "--types", "1", "--capsule-dim", "4", "--epochs", "1", "--accelerator", "cpu"]
TINY += ["--batch-size", "20"]


def train(out: Path, *options: str) -> int:
    return cli.main(["train", "--out", str(out), *options])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_same(one: Path, other: Path, tolerance: float = 0) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


def course(out: Path) -> list[dict[str, float]]:
    return [{name: x for name, x in row.items() if name != "images/s"} for row in read_log(out)]
