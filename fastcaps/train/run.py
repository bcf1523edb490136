"""Training runs: the step, what is written and when, and how a run goes on. The loop is Lightning's."""

import dataclasses
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torchmetrics import MeanMetric

from fastcaps._atomic import write_whole
from fastcaps._version import __version__
from fastcaps.data import Dataset, MultiMNIST
from fastcaps.models import CNN, CapsNet
from fastcaps.models.network import Network
from fastcaps.train.batches import Batches
from fastcaps.train.callbacks import Keeper, Pictures, Progress, WholeFiles
from fastcaps.train.evaluation import network_loss, routing_statistics, wrong_of
from fastcaps.train.report import write_report
from fastcaps.train.samples import Samples, fingerprint, image_shape, load_data
from fastcaps.train.settings import FREE, Settings, changes, known_settings

PROBES = 32  # test images whose routing is watched
LOG_STEPS = 10  # from one line of the log to the next
WATCH_STEPS = 20  # from one look at the routing to the next
WRITTEN = ("config.json", "last.ckpt", "best.safetensors", "model.safetensors", "report.html", "log", "tensorboard")


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


# ----------------------------------------------------------------------------------------------------------------- step


def build_network(settings: Settings, shape: tuple[int, int, int], num_classes: int) -> Network:
    """The network of resolved settings, with weights drawn from their seed.

    Raises:
        ValueError: the images are too small for the kernels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.model == "cnn":
            return CNN(shape, num_classes)
        options: dict[str, Any] = {} if settings.backend is None else {"backend": settings.backend}
        assert settings.kernel_size is not None
        assert settings.primary_stride is not None
        return CapsNet(
            shape,
            num_classes,
            stem_channels=settings.stem,
            kernel_size=settings.kernel_size,
            types=settings.types,
            primary_dim=settings.primary_dim,
            primary_stride=settings.primary_stride,
            hidden_capsules=settings.capsule_layers(),
            capsule_dim=settings.capsule_dim,
            num_iterations=settings.iterations,
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
    """

    network: Network
    settings: Settings
    probes: Tensor

    def __init__(
        self, network: Network, settings: Settings, probes: Tensor, batches: Batches, config: dict[str, Any]
    ) -> None:
        super().__init__()
        self.config = config
        self.network, self.settings, self.batches = network, settings, batches
        assert settings.epochs is not None
        self.epochs = settings.epochs
        self.register_buffer("probes", probes, persistent=False)
        self.test_loss, self.test_error = MeanMetric(), MeanMetric()
        self.batch_loss = torch.compile(network_loss, fullgraph=True) if settings.compile else network_loss
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
        """The batches."""
        return self.batches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Where the next batch stands: by itself Lightning keeps it only in the middle of an epoch."""
        checkpoint["batches"] = self.batches.state_dict()
        checkpoint["fastcaps"] = self.config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on there."""
        done = checkpoint["batches"]["epoch"] + (checkpoint["batches"]["position"] > 0)
        if done > self.epochs:
            raise ValueError(f"--epochs {self.epochs}: epoch {done} has begun already")
        self.batches.load_state_dict(checkpoint["batches"])

    def on_train_start(self) -> None:
        """Start the clock of images/s, also in the middle of an epoch."""
        self.epoch_start, self.seen = time.perf_counter(), 0

    def on_train_epoch_start(self) -> None:
        """Start it again."""
        self.on_train_start()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch, or of one part of it."""
        # Dropout, too, depends on the step alone, so that nothing random needs to be kept.
        torch.manual_seed(hash((self.settings.seed, self.current_epoch, batch_idx, self.global_rank)) % 2**63)
        step = self.global_step
        if isinstance(self.network, CapsNet) and step % WATCH_STEPS == 0 and self.watched < step:
            self.watched = step
            self.write({f"routing/{k}": v for k, v in self.routing_of(self.probes).items()})
        loss, scores = self.batch_loss(self.network, self.settings, *batch)
        # Of several processes one alone must not stop: the gradient, which all share, is looked at below.
        if self.trainer.world_size == 1 and not torch.isfinite(loss):
            self.diverged(f"the loss is {loss.item()}", batch[0])
        self.seen += len(batch[0]) * self.trainer.world_size
        if step % LOG_STEPS == 0 and batch_idx % self.settings.accumulate == 0:
            speed = self.seen / (time.perf_counter() - self.epoch_start)
            self.log_dict({"loss": loss.detach(), "images/s": torch.tensor(speed)}, prog_bar=True, logger=False)
            error = 100 * wrong_of(scores.detach(), batch[1]).float().mean().item()
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.write({"train_loss": loss.item(), "train_error": error, "lr": lr})
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a gradient that is not finite spoils the weights."""
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            self.diverged(f"the norm of the gradient is {norm.item()}", self.probes)

    def diverged(self, what: str, images: Tensor) -> None:
        """Raise with everything that helps to find out why."""
        last = Path(self.trainer.default_root_dir) / "last.ckpt"
        text = f"step {self.global_step}, epoch {self.current_epoch + 1}: {what}\n"
        if isinstance(self.network, CapsNet):
            numbers = self.routing_of(images[:PROBES])
            text += "routing: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()) + "\n"
        text += f"last good checkpoint: {last if last.exists() else 'none yet'}"
        raise Diverged(text)

    def routing_of(self, images: Tensor) -> dict[str, float]:
        """:func:`routing_statistics`, outside autocast."""
        assert isinstance(self.network, CapsNet)
        with torch.autocast(self.device.type, enabled=False):
            return routing_statistics(self.network, images.to(self.network.stem.weight.dtype))

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Count the errors."""
        with torch.autocast(self.device.type, enabled=False):  # as the finished network will be tested
            loss, scores = network_loss(self.network, self.settings, *batch)
        self.test_loss.update(loss, weight=len(scores))
        self.test_error.update(100 * wrong_of(scores, batch[1]).float())

    def on_validation_epoch_end(self) -> None:
        """Report the epoch."""
        loss, error = float(self.test_loss.compute()), float(self.test_error.compute())
        self.test_loss.reset()
        self.test_error.reset()
        self.log("test_error", error, prog_bar=True, logger=False)
        speed = self.seen / max(self.trained_for, 1e-9)
        self.write({"epoch": self.current_epoch + 1, "test_loss": loss, "test_error": error, "images/s": speed})
        self.print(
            f"epoch {self.current_epoch + 1} of {self.epochs}: test error {error:.2f} %, "
            f"test loss {loss:.4f}, {speed:.0f} images/s"
        )

    def on_validation_epoch_start(self) -> None:
        """Stop the clock of images/s."""
        self.trained_for = time.perf_counter() - self.epoch_start

    def write(self, numbers: dict[str, float]) -> None:
        """To the CSV file and to TensorBoard."""
        for logger in self.loggers:
            logger.log_metrics(numbers, step=self.global_step)


# ------------------------------------------------------------------------------------------------------------------ run


def launched() -> tuple[str, int, int] | None:
    """Who has started this process beside others, how many on each machine, and on how many machines.

    Raises:
        ValueError: SLURM does not say how many there are on each machine.
    """
    if TorchElasticEnvironment.detect():  # first, as it may run under SLURM
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return "torchrun", here, int(os.environ["WORLD_SIZE"]) // here
    if SLURMEnvironment.detect():
        tasks, here = (int(os.environ.get(f"SLURM_{name}", 1)) for name in ("NTASKS", "NTASKS_PER_NODE"))
        if tasks % here or (tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ):
            raise ValueError(f"SLURM started {tasks} processes: it needs --nodes and --ntasks-per-node, not --ntasks")
        return "SLURM", here, tasks // here
    return None


def check_devices(settings: Settings) -> tuple[int, int]:
    """How many processes run on each machine, and on how many machines.

    Raises:
        ValueError: there are fewer devices, or who started the processes has started others.
    """
    devices, nodes, there = settings.devices, settings.nodes, launched()
    if there is not None:
        launcher, here, machines = there
        devices, nodes = devices or here, nodes or machines
        if (devices, nodes) != (here, machines):
            asked = f"--devices {devices} --nodes {nodes}"
            raise ValueError(f"{asked}: {launcher} has started {here} processes on each of {machines} machines")
    elif (nodes or 1) > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(f"--nodes {nodes} needs torchrun or SLURM, which tell the machines of each other")
    devices, nodes = devices or 1, nodes or 1
    gpu = settings.accelerator == "gpu" or (settings.accelerator == "auto" and torch.cuda.is_available())
    count, kind = (torch.cuda.device_count(), "GPUs") if gpu else (os.cpu_count() or 1, "CPU cores")
    if devices > count:
        raise ValueError(f"--devices {devices}: this machine has {count} {kind} that torch can use")
    return devices, nodes


def _held(out: Path) -> list[Path]:
    """What a run has left in this folder."""
    return [out / name for name in WRITTEN if (out / name).exists()]


def _config_of(out: Path) -> dict[str, Any] | None:
    """What the run in this folder was told, first of all by its checkpoint; None: nothing is there."""
    if (out / "last.ckpt").exists():
        where, config = out / "last.ckpt", WholeFiles().load_checkpoint(out / "last.ckpt").get("fastcaps")
    elif (out / "config.json").exists():
        where = out / "config.json"
        try:
            config = json.loads(where.read_text())
        except ValueError as error:
            raise ValueError(f"{where} is damaged: {error}") from error
    else:
        return None
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise ValueError(f"{where} is not of a run of fastcaps train")
    settings = Settings(**known_settings(config.get("settings"), str(where)))  # what is new since then is as it was
    return {"settings": dataclasses.asdict(settings), "data": config["data"]}


def settle(given: dict[str, Any], out: Path, resume: bool) -> tuple[Settings, Dataset | MultiMNIST, dict[str, Any]]:
    """Settings without a gap, their data, and what the run's ``config.json`` says of both.

    Raises:
        ValueError: a setting is wrong, or the run that is resumed had another network, data set or course.
        OSError: a file is missing or cannot be read.
    """
    before = _config_of(out) if resume else None
    settings = Settings(**((before["settings"] if before else {}) | given))
    data = load_data(settings)
    settings = settings.resolved(image_shape(data))
    config: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "data": fingerprint(data),
        "version": __version__,
    }
    if before is not None:
        # A cosine ends at 0 after the epochs that it was made for: with others it is another course.
        free = FREE - {"epochs"} if settings.schedule == "cosine" else FREE
        differences = changes(before["settings"], config["settings"], free) + changes(before["data"], config["data"])
        if differences:
            raise ValueError(f"{out} cannot be resumed, as {'; '.join(differences)}")
    return settings, data, config


def train(given: dict[str, Any], out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Train a network, or go on with it; see ``fastcaps train --help``.

    Writes into ``out``: ``config.json``, ``last.ckpt``, ``best.safetensors``, ``log/*/metrics.csv``, ``tensorboard/``
    and, at the end, ``model.safetensors`` and ``report.html``.

    Args:
        given: some of the :class:`Settings` by name.
        out: folder of the run.
        resume: go on with the run in ``out``, if there is one.
        overwrite: delete the run in ``out``.

    Raises:
        ValueError: settings, data or checkpoint are not what they should be.
        Diverged: the loss or the gradient was not finite.
        Interrupted: Ctrl-C or SIGTERM came; the checkpoint is written.
        OSError: something cannot be read or written.
    """
    first = getattr(rank_zero_only, "rank", 0) == 0
    if first and (held := _held(out)) and not (resume or overwrite):
        names = ", ".join(path.name for path in held)
        raise FileExistsError(f"{out} holds a run ({names}): --resume goes on, --overwrite begins anew")
    settings, data, config = settle(given, out, resume)
    devices, nodes = check_devices(settings)
    network = build_network(settings, image_shape(data), data.num_classes)
    trainer = _trainer(settings, out, devices, nodes, Keeper(out, settings.checkpoint_seconds, config))
    samples = Samples(data, settings, trainer.strategy.root_device)
    batches = Batches(
        samples.train,
        len(samples.single.train_labels),
        settings.batch_size,
        seed=settings.seed,
        rank=trainer.global_rank,
        world=trainer.world_size,
        accumulate=settings.accumulate,
    )
    probes = samples.test(torch.arange(min(PROBES, len(samples.single.test_labels))))[0]
    module = Training(network, settings, probes, batches, config)
    if settings.precision == "64":
        module.double()  # Lightning does so only after it has read a checkpoint, and would round that to float32
    # What cannot run fails here, before anything is deleted.
    with torch.no_grad():
        network.eval().to(probes.device)(probes[:1].to(next(network.parameters()).dtype))
    last = out / "last.ckpt"
    going_on = resume and last.exists()
    if first:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "config.json", json.dumps(config, indent=1).encode())  # before anything is deleted
        stale = [out / "model.safetensors", out / "report.html"]  # of a run that is made longer
        for path in _held(out):
            if path in stale or (not resume and path.name != "config.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(_described(network, config, out, going_on))
    tests = samples.tests(trainer.global_rank, trainer.world_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch.utils.data")
        trainer.fit(module.train(), val_dataloaders=tests, ckpt_path=last if going_on else None, weights_only=True)
    if trainer.is_global_zero:
        network.save(out / "model.safetensors", run=config)
        write_report(out)
        print(f"{out / 'model.safetensors'} and {out / 'report.html'} are written")


def _described(network: Network, config: dict[str, Any], out: Path, going_on: bool) -> str:
    numbers, settings = config["data"], config["settings"]
    parameters = sum(p.numel() for p in network.parameters())
    kind = type(network).__name__
    if isinstance(network, CapsNet):
        layer = network.capsules
        kind += f", {layer.in_capsules} -> {layer.out_capsules} capsules, {layer.num_iterations} routing iterations"
    what = f"{settings['data']}: {numbers['training images']} training and {numbers['test images']} test images"
    start = "going on in" if going_on else "writing to"
    return f"{what} of {' x '.join(map(str, numbers['image_shape']))}; {kind}, {parameters:,} parameters; {start} {out}"


def _trainer(settings: Settings, out: Path, devices: int, nodes: int, keeper: Keeper) -> L.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    shown = sys.stdout.isatty()
    callbacks = [keeper, Pictures(), *([Progress()] if shown else [])]
    plugins: list[Any] = [WholeFiles()]
    launcher = launched()
    if launcher is not None and launcher[0] == "SLURM":
        # It sends SIGTERM, which Keeper obeys; sbatch --requeue brings the job back.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=devices,
        num_nodes=nodes,
        # The one buffer, the probes, is the same everywhere.
        strategy=DDPStrategy(broadcast_buffers=False) if devices * nodes > 1 else "auto",
        precision={"32": "32-true", "64": "64-true"}.get(settings.precision, settings.precision),  # type: ignore[arg-type]
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate,
        logger=[CSVLogger(out, name="log", flush_logs_every_n_steps=1), TensorBoardLogger(out, "tensorboard", "")],
        callbacks=callbacks,
        plugins=plugins,
        default_root_dir=out,
        log_every_n_steps=LOG_STEPS,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=shown,
    )
