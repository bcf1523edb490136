"""Time and memory of a step."""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcaps._deprecated import FormerTuple


def saved_bytes(routing: Callable[[Tensor, Tensor], Tensor], poses: Tensor, weight: Tensor) -> int:
    """What autograd keeps between the forward and the backward of ``routing``, beside poses and weight, in bytes.

    Args:
        routing: from poses and weight to output poses, once through.
        poses: ``[B, I, D_in]``, requiring a gradient.
        weight: ``[I, J, D_out, D_in]``, requiring a gradient.
    """
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = routing(poses, weight)
    for x in (poses, weight):
        storages.pop(x.untyped_storage().data_ptr(), None)
    del out  # until here, so that no address was used twice
    return sum(storages.values())


@dataclass(frozen=True)
class Cost(FormerTuple):
    """Time and memory of a step.

    Attributes:
        milliseconds: the median time.
        peak: bytes of tensors at the peak, beyond those before the step.
    """

    milliseconds: float
    peak: int


def training_cost(step: Callable[[], Any], device: torch.device | str, rounds: int = 3) -> Cost:
    """Time a step, and the peak of the memory that it takes from PyTorch's allocator.

    Args:
        step: what is measured; it runs ``rounds + 2`` times.
        device: where it runs.
        rounds: how often it is timed.

    Example:
        >>> training_cost(lambda: torch.zeros(1000, dtype=torch.float32), "cpu").peak
        4000
    """
    kind = torch.device(device).type
    synchronize = torch.cuda.synchronize if kind == "cuda" else lambda: None
    step()
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    if kind == "cuda":
        before = reset_peak(kind)
        step()
        synchronize()
        return Cost(statistics.median(times), torch.cuda.max_memory_allocated() - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to the terminal
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return Cost(statistics.median(times), max(itertools.accumulate((e.nbytes() for e in events), initial=0)))


def free_memory(device: torch.device | str) -> int | None:
    """The bytes that can still be allocated on a device, about; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return None
    return 1024 * int(found.split()[1])


def reset_peak(device: str) -> int:
    """Begin a new peak of CUDA memory; the bytes that are allocated now."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
