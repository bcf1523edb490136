"""A training run that is stopped at a chosen moment: ``python interrupted.py MOMENT AT [options of train]``."""

import os
import signal
import sys
from pathlib import Path

from fastcaps import cli, settings, training


def stop(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def at_step(at: int, number: int) -> None:
    original = training.Training.on_before_optimizer_step

    def hook(self, optimizer):
        original(self, optimizer)
        if self.global_step == at:
            stop(number)

    training.Training.on_before_optimizer_step = hook


def at_checkpoint(at: int) -> None:
    """Between writing checkpoint number ``at`` to the side and renaming it."""
    replace, count = os.replace, 0

    def hook(before, after):
        nonlocal count
        if Path(after).name == "last.ckpt":
            count += 1
            if count == at:
                stop()
        replace(before, after)

    settings.os.replace = hook


def at_test(at: int) -> None:
    original = training.Training.validation_step

    def hook(self, batch, batch_idx):
        if self.current_epoch == at:
            stop()
        original(self, batch, batch_idx)

    training.Training.validation_step = hook


if __name__ == "__main__":
    moment, at = sys.argv[1], int(sys.argv[2])
    if moment == "checkpoint":
        at_checkpoint(at)
    elif moment == "test":
        at_test(at)
    else:
        at_step(at, getattr(signal, moment))
    sys.exit(cli.main(["train", *sys.argv[3:]]))
