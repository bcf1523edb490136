"""Training runs: start, resumption and what they leave. The loop is Lightning's."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fastcaps._atomic import named, write_whole
from fastcaps._reading import read_json
from fastcaps._version import __version__
from fastcaps.data import Dataset, MultiMNIST
from fastcaps.models.network import Network
from fastcaps.train.batches import Batches
from fastcaps.train.callbacks import Keeper, Pictures, Progress, WholeFiles
from fastcaps.train.evaluation import list_classes
from fastcaps.train.lock import locked
from fastcaps.train.module import LOG_STEPS, PROBES, Diverged, Training, build_network
from fastcaps.train.report import write_report
from fastcaps.train.samples import Samples, class_weights, fingerprint, load_data, training_counts
from fastcaps.train.settings import FREE, Settings, changes, run_config

__all__ = ["Diverged", "check_devices", "launched", "settle", "train"]

WRITTEN = ("config.json", "last.ckpt", "best.safetensors", "model.safetensors", "report.html", "log", "tensorboard")


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
        return run_config(WholeFiles().load_checkpoint(out / "last.ckpt")["fastcaps"], str(out / "last.ckpt"))
    if (out / "config.json").exists():
        return run_config(read_json(out / "config.json"), str(out / "config.json"))
    return None


def settle(given: dict[str, Any], out: Path, resume: bool) -> tuple[Settings, Dataset | MultiMNIST, dict[str, Any]]:
    """Settings without a gap, their data, and what the run's ``config.json`` says of both.

    Raises:
        ValueError: a setting is wrong, or the run that is resumed had another network, data set or course.
        OSError: a file is missing or cannot be read.
    """
    before = _config_of(out) if resume else None
    settings = Settings(**((before["settings"] if before else {}) | given))
    data = load_data(settings)
    settings = settings.resolved(data.image_shape)
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
        BlockingIOError: a run is going on in ``out``.
        OSError: something cannot be read or written.
    """
    first = _is_first()
    with locked(out) if first else contextlib.nullcontext():
        _train(given, out, first=first, resume=resume, overwrite=overwrite)


def _is_first() -> bool:
    """Whether this process is the one that writes. Lightning's rank at import leaves out the machine's number."""
    machine = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return getattr(rank_zero_only, "rank", 0) == 0 and machine == "0"


def _train(given: dict[str, Any], out: Path, *, first: bool, resume: bool, overwrite: bool) -> None:
    if first and (held := _held(out)) and not (resume or overwrite):
        names = ", ".join(path.name for path in held)
        raise FileExistsError(f"{out} holds a run ({names}): --resume goes on, --overwrite begins anew")
    settings, data, config = settle(given, out, resume)
    devices, nodes = _devices(settings, given, out if resume else None)
    network = build_network(settings, data.image_shape, data.num_classes)
    trainer = _trainer(settings, out, devices, nodes, Keeper(out, settings.checkpoint_seconds, config))
    samples = Samples(data, settings, trainer.strategy.root_device)
    module = _module(network, settings, samples, trainer, config)
    # What cannot run fails here, before anything is deleted.
    with torch.no_grad():
        network.eval().to(module.probes.device)(module.probes[:1].to(network.dtype))
    last = out / "last.ckpt"
    going_on = resume and last.exists()
    if first:
        _begin(out, config, resume)
        print(_described(network, config, out, going_on))
    tests = samples.tests(trainer.global_rank, trainer.world_size)
    with warnings.catch_warnings(), named(out):  # the loggers do not name their files
        warnings.filterwarnings("ignore", module="lightning|torch.utils.data")
        trainer.fit(module.train(), val_dataloaders=tests, ckpt_path=last if going_on else None, weights_only=True)
    if trainer.is_global_zero:
        network.save(out / "model.safetensors", run=config)
        (out / "report.html").unlink(missing_ok=True)  # of the run before it was made longer
        write_report(out)
        print(f"{out / 'model.safetensors'} and {out / 'report.html'} are written")
        if module.never_predicted:
            print(f"warning: {_missing(module.never_predicted, data, settings)}", file=sys.stderr)


def _devices(settings: Settings, given: dict[str, Any], resumed: Path | None) -> tuple[int, int]:
    """As :func:`check_devices`, whose message says that the run which is resumed asks for them, if no option does."""
    try:
        return check_devices(settings)
    except ValueError as error:
        if resumed is None or given.keys() & {"accelerator", "devices", "nodes"} or not _held(resumed):
            raise
        raise ValueError(f"{error} (as the run in {resumed} was told)") from error


def _module(
    network: Network, settings: Settings, samples: Samples, trainer: L.Trainer, config: dict[str, Any]
) -> Training:
    batches = Batches(
        samples.train,
        samples.data.num_train,
        settings.batch_size,
        seed=settings.seed,
        rank=trainer.global_rank,
        world=trainer.world_size,
        accumulate=settings.accumulate,
        labels=samples.data.tensors[1].cpu() if settings.sampling == "balanced" else None,
    )
    probes = samples.test(torch.arange(min(PROBES, samples.data.num_test)))[0]
    module = Training(network, settings, probes, batches, config, class_weights(samples.data, settings))
    if settings.precision == "64":
        module.double()  # Lightning does so only after it has read a checkpoint, and would round that to float32
    return module


def _missing(classes: list[int], data: Dataset | MultiMNIST, settings: Settings) -> str:
    """That these classes are never predicted, and what may help where they are rare."""
    text = f"no test image was taken for {list_classes(classes, data.class_names)}"
    counts = training_counts(data)
    rare = int(counts[classes].max())
    if 2 * rare <= counts.max() and settings.sampling == "uniform" and settings.class_weights == "none":
        text += (
            f"; they have at most {rare} training images, another class {int(counts.max())}: "
            "--sampling balanced or --class-weights balanced may help"
        )
    return text


def _begin(out: Path, config: dict[str, Any], resume: bool) -> None:
    """Write ``config.json``, then delete what the folder holds of another run."""
    write_whole(out / "config.json", json.dumps(config, indent=1).encode())  # before anything is deleted
    for path in _held(out) if not resume else ():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _described(network: Network, config: dict[str, Any], out: Path, going_on: bool) -> str:
    numbers, settings = config["data"], config["settings"]
    what = f"{settings['data']}: {numbers['training images']} training and {numbers['test images']} test images"
    sizes = " x ".join(map(str, numbers["image_shape"]))
    start = "going on in" if going_on else "writing to"
    return f"{what} of {sizes}; {network.summary()}, {network.num_parameters():,} parameters; {start} {out}"


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
        # The buffers, probes and class weights, are the same everywhere.
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
