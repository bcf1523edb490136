"""Is the native op ever slower than plain PyTorch? 150 random sizes of layers with a matrix for every pair, on the CPU.

    python benchmarks/grid.py --eager          # without compiled einsum, whose compilation takes most of the time
    python benchmarks/grid.py --minutes 60     # goes on where the last call stopped; about 3 hours in all
    python benchmarks/grid.py --cpu-time       # one thread and its processor time, for a machine that others use too

Contestants take turns, round by round: einsum whole and in chunks of 8 samples, both eager and compiled, and fastcaps.
``ratio`` is the median over the rounds of the fastest alternative's time over ours in the same round, with its 95 %
interval. A loss is a ratio whose interval lies below 0.95, in two runs. Sizes at which the eager forms came closest to
fastcaps are measured first with the compiled ones.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import commit, description

from fastcaps._atomic import write_whole
from fastcaps.benchmarking import SHORT, Sizes, Step, contestants

RESULTS = Path(__file__).parent / "results"
EAGER = RESULTS / "grid-eager.json"
COUNT, T = 150, 3
LARGEST = Sizes(1024, 4096, 1000, 512, 512)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in turn
ROUNDS = 9
LOSS = 0.95
MODES = ("forward", "training")
HOPELESS = 3.0  # an alternative that is so much slower than the fastest one is timed once

Clock = Callable[[], float]


def grid(count: int = COUNT, seed: int = 0) -> list[Sizes]:
    """Sizes whose logarithms are uniform, as long as votes, weight and their product are not too large for a laptop."""
    generator, found = random.Random(seed), []
    while len(found) < count:
        B, I, J, D_in, D_out = (round(math.exp(generator.uniform(0, math.log(n)))) for n in LARGEST)
        votes, weight = B * I * J * D_out, I * J * D_out * D_in
        if max(votes, weight) <= 2**24 and votes * D_in <= 3e9:
            found.append(Sizes(B, I, J, D_in, D_out))
    return found


def closest_first(
    cases: list[tuple[Sizes, torch.dtype]], eager: list[dict[str, Any]]
) -> list[tuple[Sizes, torch.dtype]]:
    """The cases by the lower ratio of their row in the results of the eager forms; those without one first."""
    ratios = {tuple(row["sizes"]): min(row[mode]["ratio"] for mode in MODES) for row in eager}
    return sorted(cases, key=lambda case: ratios.get(case[0], 0.0))


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by order statistics."""
    n, below, k = len(values), 0.0, 0
    while below + math.comb(n, k) / 2**n <= 0.025:
        below += math.comb(n, k) / 2**n
        k += 1
    ordered = sorted(values)
    return ordered[max(k - 1, 0)], ordered[min(n - k, n - 1)]


def milliseconds(step: Step, poses: Any, weight: Any, grad: Any, clock: Clock, repeats: int) -> float:
    """The mean time of ``repeats`` calls."""
    start = clock()
    for _ in range(repeats):
        poses.grad = weight.grad = None
        step(poses, weight, grad)
    return 1e3 * (clock() - start) / repeats


@torch._dynamo.config.patch(recompile_limit=64)
def contest(sizes: Sizes, dtype: torch.dtype, rounds: int, compiled: bool, clock: Clock) -> dict[str, Any]:
    """For each mode the times of the fastest alternative and of fastcaps, and their ratio."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    B, I, J, D_in, D_out = sizes
    poses = (torch.randn(B, I, D_in, generator=generator) / D_in**0.5).to(dtype)
    weight = (torch.randn(I, J, D_out, D_in, generator=generator) / 2).to(dtype)
    grad = torch.randn(B, J, D_out, generator=generator).to(dtype)
    steps = {n: s for n, s in contestants(T, "native").items() if compiled or "compiled" not in n}
    if B <= 8:
        steps = {n: s for n, s in steps.items() if "chunks" not in n}
    return {mode: _mode(steps, poses, weight, grad if mode == "training" else None, rounds, clock) for mode in MODES}


def _mode(steps: dict[str, Step], poses: Any, weight: Any, grad: Any, rounds: int, clock: Clock) -> dict[str, Any]:
    x, w = (t.clone().requires_grad_(grad is not None) for t in (poses, weight))
    timed = functools.partial(milliseconds, poses=x, weight=w, grad=grad, clock=clock)
    with torch.set_grad_enabled(grad is not None):
        for step in steps.values():
            timed(step, repeats=1)  # compiles, and loads what the first call loads
        once = {name: timed(step, repeats=1) for name, step in steps.items()}
        fastest = min(ms for name, ms in once.items() if name != "fastcaps")
        kept = {n: s for n, s in steps.items() if n == "fastcaps" or once[n] <= HOPELESS * fastest}
        times: dict[str, list[float]] = {name: [] for name in kept}
        for _ in range(rounds):
            for name, step in kept.items():
                times[name].append(timed(step, repeats=max(1, int(SHORT / max(once[name], 1e-3)))))
    best = min((n for n in kept if n != "fastcaps"), key=lambda n: statistics.median(times[n]))
    ratios = [theirs / ours for theirs, ours in zip(times[best], times["fastcaps"], strict=True)]
    low, high = interval(ratios)
    ours, theirs = (statistics.median(times[n]) for n in ("fastcaps", best))
    return {"best": best, "best_ms": theirs, "ms": ours, "ratio": statistics.median(ratios), "low": low, "high": high}


def lost(found: dict[str, Any]) -> list[str]:
    """The modes whose ratio is below 1 beyond doubt."""
    return [mode for mode in MODES if found[mode]["high"] < LOSS]


def row(sizes: Sizes, dtype: torch.dtype, *args: Any) -> dict[str, Any]:
    """One size; what is lost is measured again, and lost if it is lost twice."""
    found = contest(sizes, dtype, *args)
    if lost(found):
        again = contest(sizes, dtype, *args)
        for mode in lost(found):
            found[mode]["again"] = again[mode]
            found[mode]["loss"] = mode in lost(again)
    return {"sizes": list(sizes), "dtype": str(dtype).removeprefix("torch."), **found}


def main() -> int:
    """Measure what the result file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after the size that passes this limit")
    parser.add_argument("--eager", action="store_true", help="without compiled einsum")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its processor time")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="default: results/grid-<what>.json")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else min(2, torch.get_num_threads()))
    clock = time.process_time if args.cpu_time else time.perf_counter
    conditions = {"compiled": not args.eager, "clock": "processor time" if args.cpu_time else "wall time"}
    name = f"grid-{'eager' if args.eager else 'compiled'}{'-cpu-time' if args.cpu_time else ''}.json"
    out = args.out or RESULTS / name
    content = json.loads(out.read_text()) if out.exists() else {"rows": []}
    content = {"machine": description(), "commit": commit(), **conditions, "rows": content["rows"]}
    done, start = {tuple(r["sizes"]) for r in content["rows"]}, time.monotonic()
    cases = list(zip(grid(), itertools.cycle(DTYPES), strict=False))
    if not args.eager and EAGER.exists():
        cases = closest_first(cases, json.loads(EAGER.read_text())["rows"])
    for sizes, dtype in (case for case in cases if case[0] not in done):
        if time.monotonic() - start > 60 * args.minutes:
            break
        content["rows"].append(row(sizes, dtype, args.rounds, not args.eager, clock))
        write_whole(out, (json.dumps(content, indent=1) + "\n").encode())
        last = content["rows"][-1]
        said = ", ".join(f"{mode} {last[mode]['ratio']:.2f} ({last[mode]['best']})" for mode in MODES)
        print(f"{len(content['rows'])}: {tuple(sizes)} {last['dtype']}: {said}", file=sys.stderr)
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
