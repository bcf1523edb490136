"""What the cycle model says of sweeps that were measured on a GPU, beside the measurements; without a GPU.

    python benchmarks/gpu_predictions.py

The loops are those of the commits that were measured (results/sass-*.txt.xz), the sizes the paper's layer at B = 1024:

- sweeps of the forward, all three: time in a graph less that of `squash_vectors`;
- a sweep of the backward;
- the last sweep: what it takes beyond that at B = 128, as two groups of input capsules a block have a fixed cost.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gpu_cycles
import sass
from cycle_model import CLOCK_GHZ, cycles
from gpu_cycles import PASSES, RESULTS
from sass import Code

Rounds = Callable[[Code], int]
MULTIPROCESSORS, BLOCK_WARPS = 132, 4
# Units of a warp at B = 1024. A block has 4 batch tiles, of which there are 128. 3 blocks of a multiprocessor make 12
# slices of 96 input capsules, 2 blocks 8 of 144.
FORWARD_UNITS, BACKWARD_UNITS = 1152 / 12, 1152 / 8
# 112 batch tiles more than at B = 128, in equal shares for all warps.
LAST_UNITS = 1152 * 112 / (MULTIPROCESSORS * 2 * BLOCK_WARPS)


class Run(NamedTuple):
    """A file of measurements, and the commit that they are of."""

    file: str
    commit: str
    rounds: Rounds = gpu_cycles.nested_rounds


def staged_rounds(loop: Code) -> int:
    """As `nested_rounds`, where the last sweep copies V, ds and statistics of the next batch tile by cp.async."""
    copies = sum(instruction.kind == "LDGSTS" for instruction in loop)
    # Over V and ds of three iterations; in it over four copies at a time, when up to three are done; over statistics.
    of_copies = {7: 5, 4: 0, 1: 2}
    return of_copies[copies] if copies in of_copies else gpu_cycles.nested_rounds(loop)


RUNS = [Run("gpu-nvidia-h200-1.json", "6cb0157"), Run("gpu-nvidia-h200-2.json", "8018ea6", staged_rounds)]


def measured(run: Run) -> dict[str, dict[str, float]]:
    """Microseconds by precision and part."""
    cases = json.loads((RESULTS / run.file).read_text())["cases"]
    found = {}
    for precision in gpu_cycles.FORMS:
        large, small = (cases.get(f"{shape} | {precision} | fastcaps native") for shape in ("paper-1024", "paper"))
        if large and small:
            # Of kernels whose names begin alike these files have the last one only: the backward's.
            sweep, calls = kernel(large, "tile_sweep")
            found[precision] = {
                "forward": large["forward"]["graph_us"]["median"] - kernel(large, "squash_vectors<")[0],
                "backward": sweep / calls,
                "last": kernel(large, "tile_gradients")[0] - kernel(small, "tile_gradients")[0],
            }
    return found


def kernel(case: dict[str, Any], name: str) -> list[float]:
    """Microseconds and launches of a kernel."""
    return next(value for key, value in case["kernels_us"].items() if f"::{name}" in key)


def predicted(loops: dict[str, Code], precision: str, rounds: Rounds = gpu_cycles.nested_rounds) -> dict[str, float]:
    """The same by the model."""

    def unit(name: str) -> float:
        wanted = PASSES[name]
        of_pass = partial(gpu_cycles.nested_rounds, chunk=wanted.chunk) if "ring" in name else rounds
        code = gpu_cycles.played(loops[f"{precision}, {name}"], of_pass)
        return cycles(code, wanted.warps, wanted.load) / wanted.units

    way = "ring" if f"{precision}, uniform, ring" in loops else "streamed"  # with as many units of a warp
    of_warp = {
        "forward": FORWARD_UNITS * (unit(f"uniform, {way}") + 2 * unit(f"softmax, {way}")),
        "backward": BACKWARD_UNITS * unit(f"backward, {way}"),
        "last": LAST_UNITS * unit("last"),
    }
    return {part: count / CLOCK_GHZ / 1000 for part, count in of_warp.items()}


def compared(run: Run) -> list[tuple[str, str, float, float]]:
    """Precision, part, microseconds measured and predicted."""
    _, loops = sass.read(RESULTS / f"sass-{run.commit}.txt.xz")
    return [
        (precision, part, time, model[part])
        for precision, times in measured(run).items()
        for model in [predicted(loops, precision, run.rounds)]
        for part, time in times.items()
    ]


def main() -> int:
    """Print the comparison."""
    for run in RUNS:
        print(f"{run.file}, commit {run.commit}")
        for precision, part, time, model in compared(run):
            print(f"  {precision:<9} {part:<9} {time:6.1f} us measured, {model:6.1f} predicted: {model / time:.2f}")
    print("the kernels as they are now")
    _, loops = sass.read(gpu_cycles.CURRENT)
    for precision in gpu_cycles.FORMS:
        for part, model in predicted(loops, precision).items():
            print(f"  {precision:<9} {part:<9} {model:22.1f} predicted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
