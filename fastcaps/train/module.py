"""One step of a training run: the network, its loss, its optimizer and what is logged."""

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from fastcaps.models import CNN, CapsNet
from fastcaps.models.network import Network
from fastcaps.train.batches import Batches
from fastcaps.train.checkpoint import check_state
from fastcaps.train.evaluation import class_counts, never_predicted, routing_statistics, wrong_of
from fastcaps.train.settings import Settings

PROBES = 32  # test images whose routing is watched
LOG_STEPS = 10  # from one line of the log to the next
WATCH_STEPS = 20  # from one look at the routing to the next


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


def build_network(settings: Settings, shape: tuple[int, int, int], num_classes: int) -> Network:
    """The network of resolved settings, with weights drawn from their seed.

    Args:
        settings: resolved.
        shape: ``(C, H, W)`` of the images.
        num_classes: J.

    Raises:
        ValueError: the images are too small for the kernels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.model == "cnn":
            return CNN(shape, num_classes)
        options: dict[str, Any] = {} if settings.backend is None else {"backend": settings.backend}
        assert settings.primary_stride is not None
        return CapsNet(
            shape,
            num_classes,
            stem_channels=settings.stem,
            kernel_size=settings.kernel_size,
            stem_stride=settings.stem_stride,
            types=settings.types,
            primary_dim=settings.primary_dim,
            primary_stride=settings.primary_stride,
            hidden_capsules=settings.capsule_layers(),
            capsule_dim=settings.capsule_dim,
            num_iterations=settings.num_iterations,
            bias=bool(settings.bias),
            decoder=bool(settings.reconstruction),
            **options,
        )


class Training(L.LightningModule):
    """A network, its loss and its optimizer.

    Args:
        network: what is trained.
        settings: resolved.
        probes: test images ``[B, C, H, W]`` whose routing is watched.
        batches: to train on.
        config: what ``config.json`` says; checkpoints say it, too.
        class_weights: ``[J]``, for the loss of training; the test counts all images alike.

    Attributes:
        never_predicted: the classes that no image of the last test was taken for, though there were some.
    """

    network: Network
    settings: Settings
    probes: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        network: Network,
        settings: Settings,
        probes: Tensor,
        batches: Batches,
        config: dict[str, Any],
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.network, self.settings, self.batches = network, settings, batches
        assert settings.epochs is not None
        self.epochs = settings.epochs
        self.register_buffer("probes", probes, persistent=False)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.never_predicted: list[int] = []
        self.test_loss, self.test_error = MeanMetric(), MeanMetric()
        loss = network.training_loss
        self.batch_loss = torch.compile(loss, fullgraph=True) if settings.compile else loss
        self.loss_options = settings.loss_options()
        self.epoch_start = self.seen = 0.0
        self.watched = -1  # the step at which the routing was looked at last

    def configure_optimizers(self) -> Any:
        """Adam, and the schedule of its learning rate, step by step."""
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.settings.lr)
        per_epoch = len(self.batches) // self.settings.accumulate
        total = per_epoch * self.epochs
        factor = {
            "constant": lambda step: 1.0,
            "exponential": lambda step: 0.9 ** (step / per_epoch),
            "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * min(step / total, 1)),
        }[self.settings.schedule]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Batches:
        """The training batches."""
        return self.batches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position of the next batch, which Lightning keeps only in the middle of an epoch, and the run."""
        checkpoint["batches"] = self.batches.state_dict()
        checkpoint["fastcaps"] = self.config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint, and go on at the batch that it names."""
        check_state(checkpoint, self._state(), str(self._last))
        done = checkpoint["batches"]["epoch"] + (checkpoint["batches"]["position"] > 0)
        if done > self.epochs:
            raise ValueError(f"--epochs {self.epochs}: epoch {done} has begun already")
        self.batches.load_state_dict(checkpoint["batches"])

    @property
    def _last(self) -> Path:
        return Path(self.trainer.default_root_dir) / "last.ckpt"

    def _state(self) -> dict[str, Any]:
        """Parts of a checkpoint, as they would be written now, with a state of the optimizer for each parameter."""
        made, zero = self.configure_optimizers(), torch.tensor(0.0)
        moments = {n: {"step": zero, "exp_avg": p, "exp_avg_sq": p} for n, p in enumerate(self.network.parameters())}
        loop = self.trainer.fit_loop.state_dict()
        loop["state_dict"]["combined_loader"] = [self.batches.state_dict()]
        return {
            "state_dict": self.state_dict(),
            "optimizer_states": [made["optimizer"].state_dict() | {"state": moments}],
            "lr_schedulers": [made["lr_scheduler"]["scheduler"].state_dict()],
            "loops": {"fit_loop": loop},
            "callbacks": {"Keeper": {"best": 0.0}},
            "batches": self.batches.state_dict(),
        }

    def on_train_start(self) -> None:
        """Start the clock of images/s, also in the middle of an epoch."""
        self.epoch_start, self.seen = time.perf_counter(), 0

    def on_train_epoch_start(self) -> None:
        """Start the clock of images/s again."""
        self.on_train_start()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch, or of one part of it."""
        # Dropout, too, depends on the step alone, so that nothing random needs to be kept.
        torch.manual_seed(hash((self.settings.seed, self.current_epoch, batch_idx, self.global_rank)) % 2**63)
        if self.global_step % WATCH_STEPS == 0 and self.watched < self.global_step:
            self.watched = self.global_step
            if numbers := self.routing_of(self.probes):
                self.write({f"routing/{name}": number for name, number in numbers.items()})
        loss, scores = self.batch_loss(*batch, **self.loss_options, class_weights=self.class_weights)
        # Of several processes one alone must not stop: the gradient, which all share, is looked at below.
        if self.trainer.world_size == 1 and not torch.isfinite(loss):
            self.diverged(f"the loss is {loss.item()}", batch[0])
        self.seen += len(batch[0]) * self.trainer.world_size
        if self.global_step % LOG_STEPS == 0 and batch_idx % self.settings.accumulate == 0:
            self.log_step(loss.detach(), scores.detach(), batch[1])
        return loss

    def log_step(self, loss: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Show the loss and the speed beside the bar; log loss, error and learning rate."""
        speed = self.seen / (time.perf_counter() - self.epoch_start)
        self.log_dict({"loss": loss, "images/s": torch.tensor(speed)}, prog_bar=True, logger=False)
        error = 100 * wrong_of(scores, labels).float().mean().item()
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.write({"train_loss": loss.item(), "train_error": error, "lr": lr})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a gradient that is not finite spoils the weights."""
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            self.diverged(f"the norm of the gradient is {norm.item()}", self.probes)

    def diverged(self, what: str, images: Tensor) -> None:
        """Raise :class:`Diverged` with everything that helps to find out why; ``images`` are looked at."""
        text = f"step {self.global_step}, epoch {self.current_epoch + 1}: {what}\n"
        if numbers := self.routing_of(images[:PROBES]):
            text += "routing: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()) + "\n"
        text += f"last good checkpoint: {self._last if self._last.exists() else 'none yet'}"
        raise Diverged(text)

    def routing_of(self, images: Tensor) -> dict[str, float]:
        """:func:`routing_statistics` of images ``[B, C, H, W]``, outside autocast."""
        with torch.autocast(self.device.type, enabled=False):
            return routing_statistics(self.network, images.to(self.network.dtype))

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Loss and errors of one batch of the test set."""
        with torch.autocast(self.device.type, enabled=False):  # as the finished network will be tested
            loss, scores = self.network.training_loss(*batch, **self.loss_options)
        self.test_loss.update(loss, weight=len(scores))
        self.test_error.update(100 * wrong_of(scores, batch[1]).float())
        self.test_counts += class_counts(scores, batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log and print the epoch."""
        loss, error = float(self.test_loss.compute()), float(self.test_error.compute())
        self.test_loss.reset()
        self.test_error.reset()
        self.log("test_error", error, prog_bar=True, logger=False)
        self.never_predicted = never_predicted(self.trainer.strategy.reduce(self.test_counts, reduce_op="sum"))
        missing = len(self.never_predicted)
        speed = self.seen / max(self.trained_for, 1e-9)
        numbers = {"test_loss": loss, "test_error": error, "images/s": speed, "never_predicted": missing}
        self.write({"epoch": self.current_epoch + 1, **numbers})
        self.print(
            f"epoch {self.current_epoch + 1} of {self.epochs}: test error {error:.2f} %, "
            f"test loss {loss:.4f}, {speed:.0f} images/s"
            + (f", {missing} of {self.network.num_classes} classes never predicted" if missing else "")
        )

    def on_validation_epoch_start(self) -> None:
        """Stop the clock of images/s, and begin to count."""
        self.trained_for = time.perf_counter() - self.epoch_start
        self.test_counts = torch.zeros(2, self.network.num_classes, dtype=torch.long, device=self.device)

    def write(self, numbers: dict[str, float]) -> None:
        """Log numbers to the CSV file and to TensorBoard."""
        for logger in self.loggers:
            logger.log_metrics(numbers, step=self.global_step)
