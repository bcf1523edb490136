"""The native kernels beside the best that plain PyTorch can do.

    pytest benchmarks/ --benchmark-json=benchmarks/results/NAME.json
    pytest benchmarks/ -k "paper and not paper_" --against=benchmarks/results/NAME.json --worse=15

The contestants of a row take turns, round by round, on inputs that change from call to call, after each has shown that
its output and gradients are right (fastcaps.benchmarking.compare). pytest-benchmark gets the times that were taken: by
itself it would time one contestant after the other, and a slow minute of the machine would hit one of them.
``ratio`` is speed against the fastest alternative of the row, by medians; ``share_of_floor`` is the time that the
multiplications and additions alone would take at the rate measured in the same minutes, over the 20th percentile.
"""

import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from machine import fma_peak

from fastcaps.benchmarking import FORMS, HALF, Sizes, Timing, compare, median_and_p20
from fastcaps.routing import dynamic_routing

ROWS: dict[str, tuple[Sizes, dict[str, Any]]] = {  # B, I, J, D_in, D_out
    "paper": (Sizes(128, 1152, 10, 8, 16), {"half": True}),
    "one_sample": (Sizes(1, 1152, 10, 8, 16), {}),
    "four_samples": (Sizes(4, 1152, 10, 8, 16), {}),
    "odd_sizes": (Sizes(100, 1000, 11, 12, 20), {}),
    "hundred_classes": (Sizes(32, 1152, 100, 8, 16), {}),
    "wide_outputs": (Sizes(32, 2560, 10, 8, 32), {}),
    "shared_matrix": (Sizes(256, 200, 4, 64, 64), {"shared": True, "prior": True, "mask": True}),
    "tiny": (Sizes(8, 10, 10, 16, 16), {}),
}
T = 3
CONTESTANTS = [
    *(f"{form}{way}" for form in FORMS for way in ("", ", compiled")),
    "einsum, best chunk",
    "einsum, compiled, best chunk",
    "fastcaps",
    HALF,
]


def flop(sizes: Sizes, mode: str) -> float:
    """Multiplications and additions that the algorithm without stored votes cannot do without."""
    B, I, J, D_in, D_out = sizes
    pairs = B * I * J
    votes, forward, backward = 2 * pairs * D_in * D_out, (T - 1) * (4 * D_out + 5), (T - 1) * (14 * D_out + 20)
    total = T * votes + pairs * forward
    return total if mode == "forward" else total + (T + 2) * votes + pairs * backward


@cache
def measured(row: str, rounds: int) -> tuple[dict[str, Timing], int, float]:
    """The contestants of a row, the chunk that was best, and GFLOP/s from registers alone."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    sizes, options = ROWS[row]
    chunk = 1
    if sizes[0] > 4:
        tried = {}
        for n in (n for n in (4, 8, 16, 32) if n < sizes[0]):
            chunked = {**options, "chunk": n, "half": False, "names": [f"einsum, chunks of {n}"]}
            (t,) = compare(**sizes._asdict(), rounds=1, **chunked)
            if t.training:
                tried[min(t.training)] = n
        chunk = tried[min(tried)]
    quick = math.prod(sizes) < 1e7
    peak = fma_peak()
    torch._dynamo.reset()
    names = [c.replace("best chunk", f"chunks of {chunk}") for c in CONTESTANTS if chunk > 1 or "chunk" not in c]
    options = {**options, "forms": list(FORMS), "chunk": chunk, "names": names}
    found = compare(**sizes._asdict(), rounds=rounds * (3 if quick else 1), **options)
    peak = max(peak, fma_peak())
    gc.collect()
    return {t.name.replace(f"chunks of {chunk}", "best chunk"): t for t in found}, chunk, peak


class Replay:
    """A clock that shows the times that were taken."""

    def __init__(self, times: list[float]) -> None:
        self.left, self.now = list(times), 0.0

    def __call__(self) -> float:
        return self.now

    def target(self) -> None:
        self.now += self.left.pop(0) / 1e3


def replay(benchmark: Any, times: list[float]) -> None:
    clock = Replay(times)
    benchmark._timer = clock
    benchmark.pedantic(clock.target, rounds=len(times), iterations=1)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("row", ROWS)
def test_routing(benchmark: Any, request: pytest.FixtureRequest, row: str, contestant: str, mode: str) -> None:
    sizes, options = ROWS[row]
    if contestant == HALF and not options.get("half"):
        pytest.skip("bfloat16 is measured at the paper's sizes")
    timings, chunk, peak = measured(row, request.config.getoption("--rounds"))
    if contestant not in timings:
        pytest.skip("no chunks of so few samples" if "chunk" in contestant else "not a contestant of this row")
    timing = timings[contestant]
    assert "fastcaps" not in contestant or not timing.refused, timing.refused
    if timing.refused:
        pytest.skip(timing.refused)
    times = getattr(timing, mode)
    replay(benchmark, times)
    benchmark.group = f"{row}, {mode}"
    benchmark.extra_info |= {
        "row": row, "mode": mode, "contestant": contestant, "sizes": list(sizes), "num_iterations": T,
        "p20_ms": median_and_p20(times)[1], "error": max(timing.error, timing.gradient_error),
    }  # fmt: skip
    if "chunk" in contestant:
        benchmark.extra_info["chunk"] = chunk
    if contestant == "fastcaps":
        others = {n: getattr(t, mode) for n, t in timings.items() if "fastcaps" not in n and not t.refused}
        best = min(others, key=lambda n: median_and_p20(others[n])[0])
        ratio = median_and_p20(others[best])[0] / median_and_p20(times)[0]
        benchmark.extra_info |= {"ratio": ratio, "best_alternative": best}
        if not options.get("shared") and sizes[0] > 10 and peak:  # votes that are kept or absorbed need another count
            share = flop(sizes, mode) / (1e6 * peak) / median_and_p20(times)[1]
            benchmark.extra_info |= {"peak_gflops": peak, "share_of_floor": share}
        ratios = request.config.__dict__.setdefault("_fastcaps_ratios", {})
        ratios[request.node.name] = ratio
    if contestant == HALF:
        single = getattr(timings["fastcaps"], mode)
        benchmark.extra_info["ratio_to_float32"] = median_and_p20(single)[0] / median_and_p20(times)[0]


@pytest.mark.parametrize("letter", ["B", "I", "J", "T"])
def test_scaling(benchmark: Any, letter: str) -> None:
    """Time as a power of each size: 1 is linear."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    factors, times = (1, 2, 4, 8), {}
    calls: dict[int, Callable[[], None]] = {}
    for factor in factors:
        size = {"B": 64, "I": 288, "J": 10, "T": 3}
        size[letter] *= factor
        poses = torch.randn(size["B"], size["I"], 8, requires_grad=True)
        weight = (torch.randn(size["I"], size["J"], 16, 8) / 4).requires_grad_()

        def call(x: torch.Tensor = poses, w: torch.Tensor = weight, n: int = size["T"]) -> None:
            dynamic_routing(x, w, num_iterations=n).sum().backward()

        calls[factor], times[factor] = call, []
    clock = time.perf_counter
    for round_ in range(8):
        for factor, call in calls.items():
            start = clock()
            call()
            if round_:
                times[factor].append(1e3 * (clock() - start))
    replay(benchmark, times[1])
    benchmark.group = "scaling"
    logs = [(math.log(n), math.log(median_and_p20(times[n])[0])) for n in factors]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    benchmark.extra_info |= {"letter": letter, "exponent": exponent}


MEMORY = """
import torch
from fastcaps.routing import dynamic_routing
from fastcaps.benchmarking import einsum_routing
torch.set_num_threads(min(2, torch.get_num_threads()))
routing = {"fastcaps": dynamic_routing, "einsum": lambda x, w: einsum_routing(x, w, 3)}[%r]
def tensors(B):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(B, 1152, 8, generator=generator), torch.randn(1152, 10, 16, 8, generator=generator)
    return x.requires_grad_(), w.requires_grad_(), torch.ones(B, 10, 16)
def kilobytes(name):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name)))
x, w, grad = tensors(2)
routing(x, w).backward(grad[:2])  # what PyTorch loads on first use
x, w, grad = tensors(128)
x.grad, w.grad = torch.zeros_like(x), torch.zeros_like(w)
x.grad += 1  # resident
w.grad += 1
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = kilobytes("VmRSS")
out = routing(x, w)
d_x, d_w = torch.autograd.grad(out, (x, w), grad)
results = sum(t.numel() * t.element_size() for t in (out, d_x, d_w))
print(kilobytes("VmHWM") * 1024 - before * 1024 - results)
"""


@pytest.mark.parametrize("contestant", ["fastcaps", "einsum"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(benchmark: Any, contestant: str) -> None:
    """Peak of a training step at the paper's sizes beyond inputs, output and gradients, in a fresh process."""
    run = subprocess.run([sys.executable, "-c", MEMORY % contestant], capture_output=True, text=True, check=True)
    replay(benchmark, [0.0])
    benchmark.group = "memory"
    benchmark.extra_info |= {"contestant": contestant, "peak_beyond_tensors_MB": int(run.stdout) / 1e6}
