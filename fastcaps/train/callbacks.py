"""Callbacks of a training run: checkpoints, clean stops, pictures, progress."""

import io
import signal
import threading
from pathlib import Path
from time import monotonic
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fastcaps._atomic import write_whole
from fastcaps._reading import check_zip, one_line, read_json
from fastcaps.models import CapsNet
from fastcaps.train import figures
from fastcaps.train.checkpoint import check_parts
from fastcaps.train.module import Training


class Interrupted(Exception):
    """A stop by Ctrl-C or SIGTERM, after the checkpoint is written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all, and are read without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint whole or not at all."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(path, buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain values.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged, or not of a run.
        """
        check_zip(path)
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whole, but no checkpoint: what the unpickler says is not documented
            raise ValueError(f"{path} cannot be read as a checkpoint: {one_line(error)}") from error
        check_parts(checkpoint, str(path))
        return checkpoint


class Keeper(L.Callback):
    """Writes ``last.ckpt`` at intervals and after each epoch, and ``best.safetensors``; stops cleanly on Ctrl-C.

    Lightning keeps its state under the name of this class: a new name would lose that of older checkpoints.

    Args:
        out: folder of the run.
        seconds: from one checkpoint to the next.
        run: what ``config.json`` says.
    """

    def __init__(self, out: Path, seconds: float, run: dict[str, Any]) -> None:
        self.out, self.seconds, self.run = out, seconds, run
        self.best, self.interrupted, self.saved = float("inf"), False, 0.0
        self.handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The lowest test error, for a checkpoint."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the lowest test error from a checkpoint."""
        self.best = state_dict["best"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that all processes see what the first has written: else some would go on while others begin.

        Raises:
            ValueError: ``out`` is not one folder for all, or not all were told the same.
        """
        file = self.out / "config.json"
        try:
            same = read_json(file) == self.run
        except (OSError, ValueError):  # told to all, below
            same = False
        if not trainer.strategy.reduce_boolean_decision(same):
            raise ValueError(f"{file} must be the same for all processes: one folder, on all machines, and one command")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take signals: the first asks for a checkpoint, a second one is obeyed at once."""
        self.saved = monotonic()

        def asked(number: int, frame: Any) -> None:
            self.interrupted = True
            signal.signal(number, signal.SIG_DFL)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, asked)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give signals their former handlers back."""
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give signals their former handlers back."""
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: Training, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a whole step is done; at the end of an epoch only after the test, so that none is lost."""
        if (batch_idx + 1) % pl_module.settings.accumulate or trainer.is_last_batch:
            return
        due = self.interrupted or monotonic() >= self.saved + self.seconds
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # all processes save, and stop, at the same step
            self.save(trainer)
            self.stop_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Training) -> None:  # type: ignore[override]
        """Keep the weights with the lowest test error."""
        error = float(trainer.callback_metrics["test_error"])
        if error < self.best:
            self.best = error
            if trainer.is_global_zero:
                pl_module.network.save(self.out / "best.safetensors", run=self.run | {"test_error": error})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Training) -> None:  # type: ignore[override]
        """Save where an epoch and its test are done."""
        self.save(trainer)
        if trainer.current_epoch + 1 < pl_module.epochs:
            self.stop_if_asked(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write ``last.ckpt``."""
        trainer.save_checkpoint(self.out / "last.ckpt")
        self.saved = monotonic()

    def stop_if_asked(self, trainer: L.Trainer) -> None:
        """Raise :class:`Interrupted` in all processes if a signal came to any."""
        if trainer.strategy.reduce_boolean_decision(self.interrupted, all=False):
            raise Interrupted(trainer.global_step)


class Progress(RichProgressBar):
    """Loss, error and images/s beside the bar."""

    def get_metrics(self, *args: Any) -> Any:
        """What the bar shows, without the number that a logger gives its folder."""
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}


class Pictures(L.Callback):
    """Reconstructions and coupling for TensorBoard, after each epoch."""

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: Training) -> None:  # type: ignore[override]
        """Draw the first test images."""
        network = pl_module.network
        if not isinstance(network, CapsNet):  # only capsules have something to show
            return
        board = next(logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))
        images = pl_module.probes[:12].to(network.dtype)
        if network.decoder is not None:
            board.add_figure("reconstructions", figures.reconstructions(network, images), trainer.global_step)
        board.add_figure("coupling", figures.coupling(network, images[:1]), trainer.global_step)
