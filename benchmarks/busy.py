"""A machine that others use too: the native op and einsum beside as many busy processes as there are processors.

    python benchmarks/busy.py                  # the paper's layer and a small one, forward and training

Each line is the median time, and the 90th percentile in brackets: quiet, busy, and how many times as long that is.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastcaps.benchmarking import Sizes, contestants

LAYERS = [Sizes(128, 1152, 10, 8, 16), Sizes(8, 200, 10, 8, 16), Sizes(64, 50, 10, 256, 16)]
T = 3


def _spin() -> None:
    while True:
        pass


@contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes that do nothing but take time."""
    running = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(processes)]
    for process in running:
        process.start()
    try:
        time.sleep(1 if running else 0)  # until they run
        yield
    finally:
        for process in running:
            process.kill()
            process.join()


def times(sizes: Sizes, training: bool, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of einsum and fastcaps, which take turns."""
    B, I, J, D_in, D_out = sizes
    generator = torch.Generator().manual_seed(0)
    poses = torch.randn(B, I, D_in, generator=generator).requires_grad_(training)
    weight = (torch.randn(I, J, D_out, D_in, generator=generator) / 2).requires_grad_(training)
    grad = torch.randn(B, J, D_out, generator=generator) if training else None
    steps = {name: step for name, step in contestants(T, "native").items() if name in ("einsum", "fastcaps")}
    found: dict[str, list[float]] = {name: [] for name in steps}
    start = time.monotonic()
    with torch.set_grad_enabled(training):
        while time.monotonic() - start < seconds or len(found["einsum"]) < 5:
            for name, step in steps.items():
                poses.grad = weight.grad = None
                before = time.perf_counter()
                step(poses, weight, grad)
                found[name].append(1e3 * (time.perf_counter() - before))
    return {name: taken[1:] for name, taken in found.items()}


def main() -> None:
    """Print a line for each layer, mode and contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each layer, mode and load")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="busy ones")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for sizes in LAYERS:
        for training in (False, True):
            taken = []
            for processes in (0, args.processes):
                with load(processes):
                    taken.append(times(sizes, training, args.seconds))
            for name in taken[0]:
                quiet, busy = (sorted(found[name]) for found in taken)
                medians = [statistics.median(found) for found in (quiet, busy)]
                shown = [
                    f"{m:.2f} ({found[int(0.9 * len(found))]:.2f})"
                    for m, found in zip(medians, (quiet, busy), strict=True)
                ]
                mode = "training" if training else "forward"
                print(
                    f"{tuple(sizes)} {mode}, {name}: {shown[0]}, {shown[1]}, {medians[1] / medians[0]:.1f}", flush=True
                )


if __name__ == "__main__":
    main()
