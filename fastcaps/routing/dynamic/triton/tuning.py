"""Measurement of launch parameters for the GPU at hand; writes the table that ``parameters.py`` reads.

Only ``fastcaps tune`` comes here: no call of the op measures anything.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
import triton

from fastcaps._atomic import write_whole
from fastcaps._deprecated import once_positional
from fastcaps._reading import read_json
from fastcaps.routing.dynamic.arguments import Options, Tensors
from fastcaps.routing.dynamic.triton import launch
from fastcaps.routing.dynamic.triton.launch import Call
from fastcaps.routing.dynamic.triton.parameters import TUNED, Parameters, tuned


def candidates(start: Parameters, J: int) -> list[Parameters]:
    """Launch parameters beside those of the heuristic: other tiles, numbers of stages, warps on a multiprocessor."""
    wide = max(1, start.num_warps // start.JG)
    found = [start]
    for JG in (1, 2, 4, 8):
        for most in {start.JT, max(1, start.JT - 1), start.JT + 1, math.ceil(J / JG)}:
            if JG * wide <= 8 and most <= 10:
                JT = math.ceil(J / (JG * math.ceil(J / (JG * most))))
                found.append(start._replace(JG=JG, JT=JT, num_warps=JG * wide))
    found += [start._replace(num_stages=n) for n in (1, 3)]
    found += [start._replace(warps_per_multiprocessor=n) for n in (4, 12, 16, 24)]
    return list(dict.fromkeys(found))


@once_positional(("B", "I", "J", "D_in", "D_out"), "dtype", "num_iterations", "report")
def tune(
    *,
    B: int,
    I: int,
    J: int,
    D_in: int,
    D_out: int,
    dtype: torch.dtype = torch.float32,
    num_iterations: int = 3,
    report: Callable[[str], None] = print,
) -> dict[str, Parameters]:
    """Time the candidates of each kernel in turn, in a training step, and keep the best in the table.

    Args:
        B: samples.
        I: input capsules.
        J: output capsules.
        D_in: pose size of the input capsules.
        D_out: pose size of the output capsules.
        dtype: of poses and weight; float32 is tuned as PyTorch's matmul setting is: exact, or tf32.
        num_iterations: T.
        report: takes a line for every candidate.

    Returns:
        What was written, by the table's keys.

    Raises:
        RuntimeError: there is no CUDA device.
        OSError: the table, which lies in the package, cannot be written.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("fastcaps tune measures on a GPU, and torch sees no CUDA device")
    poses = torch.randn(B, I, D_in, device="cuda").to(dtype)
    weight = (torch.randn(I, J, D_out, D_in, device="cuda") / D_in**0.5).to(dtype)
    tensors, options = Tensors(poses, weight), Options(num_iterations, leaky=False, detach=False, eps=0.0)
    grad = torch.randn(B, J, D_out, device="cuda").to(dtype)

    def step() -> None:
        _, sums = launch.forward(tensors, options)
        launch.backward(tensors, options, sums, grad, ("poses", "weight"))

    call = Call(tensors, options)
    table, chosen = tuned(call.gpu), {}
    repeated = [("sum", 0), ("dV", 0)] if num_iterations > 1 else []
    for kernel, T in (("first sum", 0), *repeated, ("gradients", num_iterations)):
        key = call.key(kernel, T)
        start = call.parameters(kernel, T)
        times: dict[Parameters, float] = {}
        for parameters in candidates(start, J):
            table[key] = parameters
            try:
                step()
                times[parameters] = triton.testing.do_bench_cudagraph(step, rep=25, return_mode="median")
                report(f"{key}: {parameters}: {1e3 * times[parameters]:.1f} us")
            except Exception as error:  # too much shared memory, say
                torch.cuda.synchronize()
                report(f"{key}: {parameters}: {type(error).__name__}")
        table[key] = chosen[key] = min(times, key=lambda p: times[p]) if times else start
    _write(call.gpu, chosen)
    return chosen


def _write(gpu: str, chosen: dict[str, Parameters]) -> None:
    tables: dict[str, dict[str, Any]] = read_json(TUNED) if TUNED.exists() else {}
    tables.setdefault(gpu, {}).update({key: parameters._asdict() for key, parameters in chosen.items()})
    write_whole(TUNED, (json.dumps(tables, indent=1, sort_keys=True) + "\n").encode())
