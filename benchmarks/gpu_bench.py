"""The op on a GPU beside the best that plain PyTorch can do, in one JSON file that is written case by case.

    make gpu-bench                                   # at most 8 minutes, offline, needs torch, triton and numpy
    make gpu-bench SHAPES="paper,J=1000"
    python benchmarks/gpu_bench.py --device cpu --shapes tiny    # tries the benchmark itself; needs TRITON_INTERPRET=1

A case is a shape, a precision and a contestant. It is first compared with float64, then its forward and its training
step are timed: on the GPU with the L2 cache as the last call left it, with the cache overwritten before each call, in a
CUDA graph, and by the host's clock; and its peak memory is read. Where a call is short, all but the graph's time is
that of the launches. ``share_of_bound`` is the largest of three times
(matrix products, other arithmetic, bytes, each at the rate that gpu_probe measures in the same run) over the time in a
graph.
"""

import argparse
import functools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_probe
import torch
from torch import Tensor

from fastcaps import benchmarking
from fastcaps.exactness import relative_error
from fastcaps.routing import dynamic_routing

RESULTS = Path(__file__).parent / "results"
T = 3

# name -> (B, I, J, D_in, D_out), whether one matrix is for all input capsules
SHAPES: dict[str, tuple[tuple[int, int, int, int, int], bool]] = {
    "paper": ((128, 1152, 10, 8, 16), False),
    "paper-1024": ((1024, 1152, 10, 8, 16), False),
    "J=100": ((128, 1152, 100, 8, 16), False),
    "J=1000": ((128, 2048, 1000, 8, 16), False),
    "DeepCaps": ((128, 2560, 10, 8, 32), False),
    "conv": ((4608, 288, 32, 16, 16), False),  # 3x3, 32 -> 32 types, 14x14 stride 2: batch 128 * 6 * 6
    "recommendation": ((4096, 200, 4, 64, 64), True),
    "10 to 10": ((256, 10, 10, 16, 16), False),
}
TINY = ((4, 3, 4, 5, 6), False)
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
ALLOWED = {"float32": 1e-5, "tf32": 5e-3, "bfloat16": 2e-2}  # relative, against float64 on inputs that were not rounded
OURS = ("fastcaps triton", "fastcaps native")
COMPILED = ("paper", "J=100", "DeepCaps")

Step = Callable[[], Any]


# --------------------------------------------------------------------------------------------------------- contestants


def routing(contestant: str) -> Callable[[Tensor, Tensor], Tensor]:
    """From poses and weight to output poses."""
    if contestant in OURS:
        backend = contestant.split()[1]
        return lambda poses, weight: dynamic_routing(poses, weight, num_iterations=T, backend=backend)
    form = benchmarking.FORMS[contestant.split(",")[0]]
    plain = lambda poses, weight: form(poses, weight, T)  # noqa: E731
    if "compiled" in contestant:
        return torch.compile(plain, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
    return plain


def steps(contestant: str, poses: Tensor, weight: Tensor, grad: Tensor) -> tuple[Step, Step]:
    """The forward without gradient, and forward with backward: calls without arguments, fit for a CUDA graph."""
    op = routing(contestant)
    leaves = [x.detach().clone().requires_grad_() for x in (poses, weight)]

    def forward() -> Tensor:
        with torch.no_grad():
            return op(poses, weight)

    def training() -> list[Tensor]:
        out = op(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return forward, training


@functools.lru_cache(maxsize=1)
def tensors(shape: str, device: str) -> tuple[Tensor, ...]:
    """Poses, weight and the output's gradient (of 16 samples, the others' is 0) in float32; then the output and the
    gradients of these 16 samples in float64."""
    (B, I, J, D_in, D_out), shared = SHAPES.get(shape, TINY)
    generator = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    poses, weight = randn(B, I, D_in) / D_in**0.5, randn(1 if shared else I, J, D_out, D_in) / 2
    grad, few = torch.zeros(B, J, D_out, device=device), min(B, 16)
    grad[:few] = randn(few, J, D_out)
    leaves = [x.double().requires_grad_() for x in (poses[:few], weight)]
    out = benchmarking.einsum_routing(*leaves, T)
    exact = torch.autograd.grad(out, leaves, grad[:few].double())
    return poses, weight, grad, out.detach(), *exact


# ----------------------------------------------------------------------------------------------------------- measuring


def cold_microseconds(call: Step, repeats: int = 10) -> dict[str, float]:
    """GPU time of one call with nothing of use in the L2 cache."""
    rubbish = torch.empty(64 * 2**20, device="cuda")  # 256 MB, several times any L2 cache
    times = []
    for _ in range(repeats):
        rubbish.fill_(1.0)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return gpu_probe.summary(times)


def graphed(call: Step) -> Step:
    """The call in a CUDA graph; its result is kept alive by the returned function."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return lambda: (graph.replay(), result)


def measured(call: Step) -> dict[str, Any]:
    """All times of a call, and its peak memory beyond what was there."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    result: dict[str, Any] = {"peak_MB": round((torch.cuda.max_memory_allocated() - before) / 1e6, 2)}
    result["warm_us"] = gpu_probe.microseconds(call)
    few = 100 if result["warm_us"]["median"] > 2000 else 500
    result |= {"cold_us": cold_microseconds(call), "wall_us": gpu_probe.host_microseconds(call, few)}
    try:
        replay = graphed(call)
        result |= {"graph_us": gpu_probe.microseconds(replay), "graph_cold_us": cold_microseconds(replay)}
    except Exception as error:
        result["graph_error"] = f"{type(error).__name__}: {error}"[:300]
        torch.cuda.synchronize()
    return result


def kernel_times(call: Step) -> dict[str, Any]:
    """Microseconds and launches of each kernel in one call, by PyTorch's profiler where the driver allows it."""
    call()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        found: dict[str, Any] = {}
        for event in profile.key_averages():
            name = event.key.removeprefix("void ").replace("fastcaps::cuda::", "")[:120]
            us, count = found.get(name, (0, 0))
            found[name] = [round(us + event.self_device_time_total, 2), count + event.count]
        return found
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def bounds(shape: str, precision: str, rates: dict[str, float]) -> dict[str, float]:
    """Microseconds that no implementation without stored votes can beat, forward and training."""
    (B, I, J, D_in, D_out), shared = SHAPES.get(shape, TINY)
    pairs = B * I * J
    size = 2 if precision == "bfloat16" else 4
    memory = size * (B * I * D_in + (1 if shared else I) * J * D_in * D_out + B * J * D_out)
    D = D_in if shared else D_out  # shared matrices are applied to sums
    votes = 0 if shared else 2 * pairs * D_in * D_out * (3 if precision == "float32" else 1)
    matrix = rates["mma_bf16" if precision == "bfloat16" else "mma_tf32"]
    result = {}
    for mode, products, other, passes in (
        ("forward", T, (T - 1) * (4 * D + 5), 1),
        ("training", 2 * T + 2, (T - 1) * (18 * D + 25), 3),
    ):
        times = products * votes / matrix, pairs * other / rates["ffma"], passes * memory / rates["copy"]
        result[mode] = round(max(times) / 1e6, 3)  # the rates are in units of 1e12
    return result


def case(shape: str, precision: str, contestant: str, rates: dict[str, float], device: str) -> dict[str, Any]:
    """Errors, then times where these are small enough."""
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    poses, weight, grad, *exact = tensors(shape, device)
    poses, weight, grad = (x.to(PRECISIONS[precision]) for x in (poses, weight, grad))
    forward, training = steps(contestant, poses, weight, grad)
    found = training()
    few = len(exact[0])
    errors = [relative_error(x[:few] if n < 2 else x, e) for n, (x, e) in enumerate(zip(found, exact, strict=True))]
    result: dict[str, Any] = {"sizes": SHAPES.get(shape, TINY)[0], "errors": [float(f"{e:.2e}") for e in errors]}
    del found
    if not max(errors) <= ALLOWED[precision]:
        return {**result, "refused": f"an error of {max(errors):.1e}"}
    if device == "cpu":
        return result
    result |= {"forward": measured(forward), "training": measured(training)}
    if contestant in OURS:
        limit = bounds(shape, precision, rates)
        for mode in ("forward", "training"):
            in_graph = result[mode].get("graph_us", result[mode]["warm_us"])["median"]
            if limit[mode] == limit[mode]:  # the rates could be measured
                result[mode] |= {"bound_us": limit[mode], "share_of_bound": round(limit[mode] / in_graph, 3)}
        result["kernels_us"] = kernel_times(training)
    return result


def commit() -> str | None:
    """The checkout's commit, and whether it has changes."""
    return gpu_probe.first_line(["git", "describe", "--always", "--dirty", "--abbrev=12"])


def ratios(cases: dict[str, Any]) -> list[str]:
    """Both of ours against the fastest alternative with the same precision, all in a graph where that works."""
    lines = []
    for name, result in cases.items():
        shape, precision, contestant = name.split(" | ")
        if contestant not in OURS or "forward" not in result:
            continue
        for mode in ("forward", "training"):
            own = result[mode].get("graph_us", result[mode]["warm_us"])["median"]
            others = {
                other: r[mode].get("graph_us", r[mode]["warm_us"])["median"]
                for other, r in cases.items()
                if other.startswith(f"{shape} | {precision} | ") and not other.endswith(OURS) and mode in r
            }
            best = min(others, key=lambda other: others[other]) if others else None
            share = f"{result[mode]['share_of_bound']:.1%}" if "share_of_bound" in result[mode] else ""
            against = f"{others[best] / own:6.2f} x {best.split(' | ')[2]}" if best is not None else ""
            lines.append(f"{shape:<16} {precision:<9} {mode:<9} {contestant} {own:10.1f} us {share:>6} {against}")
    return lines


def main() -> int:
    """Run the cases within the time limit; the file is rewritten after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="start no case after this time (default: 420)")
    parser.add_argument("--shapes", default="", help=f"of {', '.join(SHAPES)}; default: all")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--contestants", default="", help="default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the benchmark itself")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-NAME.json")
    arguments = parser.parse_args()
    start = time.monotonic()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu-bench: torch sees no CUDA device here; nothing was measured", file=sys.stderr)
        return 1
    shapes = [name.strip() for name in arguments.shapes.split(",") if name.strip()] or list(SHAPES)
    if unknown := [name for name in shapes if name not in SHAPES and name != "tiny"]:
        parser.error(f"no such shape: {', '.join(unknown)}; there are: {', '.join(SHAPES)}")
    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    out = arguments.out or RESULTS / f"gpu-{gpu.lower().replace(' ', '-')}.json"
    told = {
        name: value for name, value in vars(arguments).items() if value != parser.get_default(name) and name != "out"
    }
    options = [f"--{name} {shlex.quote(str(value))}" for name, value in told.items()]
    results: dict[str, Any] = {"command": " ".join(["python benchmarks/gpu_bench.py", *options]), "cases": {}}
    results |= {"commit": commit(), "machine": gpu_probe.machine(), "rates_T_per_s": {}}
    rates = {"copy": math.nan, "ffma": math.nan, "mma_tf32": math.nan, "mma_bf16": math.nan}
    if device == "cuda":
        rates["copy"] = gpu_probe.copy()["TB_per_s"]
        try:
            rates |= {name: value["TFLOP_per_s"] for name, value in gpu_probe.instructions().items()}
        except RuntimeError as error:
            print(f"no bounds: {error}", file=sys.stderr)
    results["rates_T_per_s"] = {name: value for name, value in rates.items() if value == value}
    todo = [(s, p, ours) for s in shapes for p in arguments.precisions.split(",") for ours in OURS]
    for contestant in ("einsum", "absorbed", "broadcast", "einsum, compiled"):
        chosen = [s for s in shapes if "compiled" not in contestant or s in COMPILED]
        todo += [(s, p, contestant) for s in chosen for p in arguments.precisions.split(",")]
    if arguments.contestants:
        todo = [job for job in todo if job[2] in arguments.contestants.split(";")]
    for shape, precision, contestant in todo:
        name = f"{shape} | {precision} | {contestant}"
        if time.monotonic() - start > arguments.seconds:
            results["cases"][name] = {"left_out": "no time left"}
        else:
            try:
                results["cases"][name] = case(shape, precision, contestant, rates, device)
            except Exception as error:  # votes that do not fit, say: that is a result; the others go on
                results["cases"][name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            if device == "cuda":
                torch.cuda.empty_cache()
        results["seconds"] = round(time.monotonic() - start, 1)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(out)
        print(f"{results['seconds']:6.1f} s  {name}: {json.dumps(results['cases'][name])[:200]}", flush=True)
    print("\n".join(ratios(results["cases"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
