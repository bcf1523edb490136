"""Benchmarks of training: the share of routing in a step, and the course of runs.

python benchmarks/training.py share             # 3 minutes on 2 cores; writes results/share-*.json
python benchmarks/training.py keep runs/mnist   # the course of a run, without weights: results/run-*.json
python benchmarks/report.py                     # the tables of both in docs/benchmarks.md
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import commit, description
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from fastcaps import CapsNet
from fastcaps.benchmarking import FORMS
from fastcaps.train.report import read_log
from fastcaps.train.settings import Settings

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BATCH = 128
PROFILED = 5  # steps
ROUTINGS: dict[str, Callable[..., Tensor] | None] = {"einsum, eager": FORMS["einsum"], "fastcaps": None}


def training_step(routing: Callable[..., Tensor] | None, precision: str) -> Callable[[], None]:
    """A whole step of the paper's network: forward, loss with reconstruction, backward, Adam."""
    torch.manual_seed(0)
    options = Settings(data="mnist").resolved((1, 28, 28)).loss_options()
    network = CapsNet((1, 28, 28), 10, **({} if routing is None else {"routing": routing}))
    optimizer = torch.optim.Adam(network.parameters())
    images = torch.rand(BATCH, 1, 28, 28)
    labels, targets = torch.randint(10, (BATCH, 1)), images[:, None]
    ranges: list[record_function] = []

    def enter(name: str) -> None:
        ranges.append(record_function(f"routing, {name}"))
        ranges[-1].__enter__()

    def leave() -> None:
        ranges.pop().__exit__(None, None, None)

    network.capsules.register_forward_pre_hook(lambda *_: enter("forward"))
    network.capsules.register_forward_hook(lambda *_: leave())
    network.capsules.register_full_backward_pre_hook(lambda *_: enter("backward"))
    network.capsules.register_full_backward_hook(lambda *_: leave())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss, _ = network.training_loss(images, labels, targets, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def share(rounds: int) -> None:
    """Time the steps in turns, then profile each."""
    rows = []
    for precision in ("32", "bf16-mixed"):
        steps = {name: training_step(routing, precision) for name, routing in ROUTINGS.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for n in range(rounds + 2):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if n >= 2:
                    times[name].append(time.perf_counter() - start)
        for name, step in steps.items():
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                start = time.perf_counter()
                for _ in range(PROFILED):
                    step()
                profiled = time.perf_counter() - start
            spent = {
                event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages() if "routing, " in event.key
            }
            step_ms = 1000 * statistics.median(times[name])
            row = {
                "precision": precision,
                "routing": name,
                "step_ms": step_ms,
                "images_per_s": 1000 * BATCH / step_ms,
                "profiled_step_ms": 1000 * profiled / PROFILED,
                "routing_ms": 1000 * sum(spent.values()) / PROFILED,
                "share": sum(spent.values()) / profiled,
            }
            rows.append(row)
            print(
                f"{precision:<11}{name:<15} step {step_ms:6.0f} ms, {row['images_per_s']:5.0f} images/s, routing "
                f"{row['routing_ms']:5.0f} ms, {100 * row['share']:.1f} % of the step"
            )
    content = {"machine": description(), "commit": commit(), "batch": BATCH, "rounds": rounds, "rows": rows}
    (RESULTS / "share-cpu.json").write_text(json.dumps(content, indent=1) + "\n")


def keep(out: Path) -> None:
    """Write down what a run was told and how it went, epoch by epoch; machine and commit are those of now."""
    run: dict[str, Any] = json.loads((out / "config.json").read_text())
    gpu = torch.cuda.is_available() and run["settings"]["accelerator"] != "cpu"
    rows = read_log(out)
    epochs = [row for row in rows if "epoch" in row]
    curve = [[row["step"], row["train_loss"]] for row in rows if "train_loss" in row and row["step"] % 50 == 0]
    content = {
        "machine": description("cuda" if gpu else "cpu"),
        "commit": commit(),
        "settings": run["settings"] | {"root": "DIR"},
        "data": run["data"],
        "epochs": [{k: row[k] for k in ("epoch", "step", "test_error", "test_loss", "images/s")} for row in epochs],
        "train_loss": curve,
    }
    file = RESULTS / f"run-{out.name}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    share_parser = commands.add_parser("share")
    share_parser.add_argument("--rounds", type=int, default=9)
    commands.add_parser("keep").add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "share":
        share(arguments.rounds)
    else:
        keep(arguments.out)
