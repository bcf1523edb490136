"""A training run that is stopped at a chosen moment: ``python interrupted.py MOMENT AT [options of train]``."""

import itertools
import os
import signal
import sys
from pathlib import Path

from fastcaps import _atomic, cli
from fastcaps.train import callbacks, module


def stop(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def at_step(at: int, *numbers: int) -> None:
    original = module.Training.on_before_optimizer_step

    def hook(self, optimizer):
        original(self, optimizer)
        if self.global_step == at:
            for number in numbers:
                stop(number)

    module.Training.on_before_optimizer_step = hook


def at_checkpoint(at: int) -> None:
    """Between writing checkpoint number ``at`` to the side and renaming it."""
    replace, count = os.replace, itertools.count(1)

    def hook(before, after):
        if Path(after).name == "last.ckpt" and next(count) == at:
            stop()
        replace(before, after)

    _atomic.os.replace = hook


def at_pictures(at: int) -> None:
    """When test ``at`` is written down, but no checkpoint."""

    def hook(self, trainer, training):
        if trainer.current_epoch == at:
            stop()

    callbacks.Pictures.on_validation_end = hook


def at_write(at: int) -> None:
    """In the middle of writing checkpoint number ``at``."""
    write, count = _atomic.write_whole, itertools.count(1)

    def hook(path, content):
        if Path(path).name == "last.ckpt" and next(count) == at:
            with _atomic.whole_file(path) as file:
                file.write(content[: len(content) // 2])
                file.flush()
                stop()
        write(path, content)

    callbacks.write_whole = hook


def at_test(at: int) -> None:
    original = module.Training.validation_step

    def hook(self, batch, batch_idx):
        if self.current_epoch == at:
            stop()
        original(self, batch, batch_idx)

    module.Training.validation_step = hook


def main(moment: str, at: str, *options: str) -> int:
    """``fastcaps train *options``, stopped at a moment."""
    callbacks.monotonic = itertools.count().__next__  # a clock that ticks once a step
    callbacks.Pictures.on_validation_end = lambda *arguments: None  # they are slow
    moments = {"checkpoint": at_checkpoint, "write": at_write, "test": at_test, "pictures": at_pictures}
    if moment in moments:
        moments[moment](int(at))
    else:
        names, _, rank = moment.partition("@")  # SIGTERM@1: to the process of rank 1 alone
        if rank in ("", os.environ.get("RANK")):
            at_step(int(at), *(getattr(signal, name) for name in names.split("+")))
    return cli.main(["train", *options])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
