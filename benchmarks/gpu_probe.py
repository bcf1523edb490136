"""What a GPU can do and what routing costs there today: the ceilings, the launches, the plain-PyTorch baselines and
the tests on CUDA tensors, in one JSON file that is written case by case.

    make gpu-probe                          # at most 8 minutes, offline, needs torch, numpy and pytest
    python benchmarks/gpu_probe.py --only machine,copy
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastcaps import benchmarking
from fastcaps.benchmarking import Sizes

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

FIRST_USE = "capture_on_first_use_here"

SHAPES = {  # B, I, J, D_in, D_out
    "paper": Sizes(128, 1152, 10, 8, 16),
    "paper, B=1024": Sizes(1024, 1152, 10, 8, 16),
    "CIFAR-100": Sizes(128, 1152, 100, 8, 16),
    "DeepCaps class capsules": Sizes(128, 2560, 10, 8, 32),
    "convolutional capsules": Sizes(4608, 288, 32, 8, 16),  # 3x3, 32 -> 32 types, 14x14 stride 2: batch 128 * 6 * 6
    "ImageNet classes": Sizes(128, 2048, 1000, 8, 16),
}


# ----------------------------------------------------------------------------------------------------------- measuring


def microseconds(call: Callable[[], Any], repeats: int = 20, inner: int = 1) -> dict[str, float]:
    """GPU time of one call by CUDA events: median, 20th percentile and minimum of ``repeats``, in microseconds."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / inner)
    return summary(times)


def host_microseconds(call: Callable[[], Any], count: int = 1000) -> dict[str, float]:
    """Host time that one asynchronous call takes to return, in microseconds."""
    for _ in range(20):
        call()
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count // 10):
            call()
        times.append(1e6 * (time.perf_counter() - start) / (count // 10))
    torch.cuda.synchronize()
    return summary(times)


def summary(times: list[float]) -> dict[str, float]:
    """Median, 20th percentile and minimum."""
    median, p20 = benchmarking.median_and_p20(times)
    return {"median": round(median, 3), "p20": round(p20, 3), "min": round(min(times), 3)}


def rate(amount: float, times: dict[str, float]) -> float:
    """Per second in units of 1e12, by the median."""
    return round(amount / times["median"] / 1e6, 2)


# ------------------------------------------------------------------------------------------------------------ machine


def machine() -> dict[str, Any]:
    """Names, versions and clocks."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "numpy": version_of("numpy"),
        "nvcc": first_line(["nvcc", "--version"], "release"),
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": p.name,
            "cuda": torch.version.cuda,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_GB": round(p.total_memory / 1e9, 1),
            "L2_MB": round(p.L2_cache_size / 1e6, 1),
            "shared_memory_per_block_KB": round(getattr(p, "shared_memory_per_block_optin", 0) / 1024, 1),
        }
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    facts["nvidia-smi " + fields] = first_line(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])
    return facts


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(command: list[str], containing: str = "") -> str | None:
    """The first line of a command's output that contains a word; None where there is no such command or line."""
    if shutil.which(command[0]) is None:
        return None
    lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.splitlines()
    return next((line.strip() for line in lines if containing in line), None)


# ----------------------------------------------------------------------------------------------------------- ceilings


def copy() -> dict[str, Any]:
    """Device memory: bytes read plus bytes written."""
    source = torch.randn(512 * 2**20, device="cuda")  # 2 GiB
    target = torch.empty_like(source)
    times = microseconds(lambda: target.copy_(source))
    return {"us": times, "TB_per_s": rate(2 * source.numel() * 4, times)}


def matmul() -> dict[str, Any]:
    """An 8192^3 product through PyTorch: fp32 (FFMA), tf32 and bf16, on random data."""
    n, result = 8192, {}
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        times = microseconds(lambda a=a, b=b: a @ b, repeats=10)
        result[name] = {"us": times, "TFLOP_per_s": rate(2 * n**3, times)}
    torch.backends.cuda.matmul.allow_tf32 = False
    return result


class ProbeKernels:
    """gpu_probe.cu, compiled for the GPU at hand; a failing launch raises with CUDA's own words."""

    def __init__(self) -> None:
        if shutil.which("nvcc") is None:
            raise RuntimeError("nvcc is not on the PATH")
        major, minor = torch.cuda.get_device_capability()
        path = Path(tempfile.mkdtemp()) / "gpu_probe.so"
        source = Path(__file__).with_suffix(".cu")
        arch = f"-arch=sm_{major}{minor}"
        command = ["nvcc", "-O3", arch, "-shared", "-Xcompiler", "-fPIC", "-o", str(path), str(source)]
        built = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if built.returncode:
            raise RuntimeError(built.stderr[-2000:])
        self.library = ctypes.CDLL(str(path))
        self.library.probe_error.restype = ctypes.c_char_p

    def __call__(self, name: str, tensor: torch.Tensor, *numbers: int) -> None:
        """Launch a kernel on the current stream, its arguments a tensor and some numbers."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        arguments = [ctypes.c_void_p(tensor.data_ptr()), *(ctypes.c_int(n) for n in numbers), stream]
        code = getattr(self.library, f"probe_{name}")(*arguments)
        if code:
            raise RuntimeError(self.library.probe_error(code).decode())


def instructions() -> dict[str, Any]:
    """Rates of FFMA and of mma.sync at the shapes that routing wants, from registers."""
    kernels, result = ProbeKernels(), {}
    blocks, threads, iterations = 8 * torch.cuda.get_device_properties(0).multi_processor_count, 256, 2000
    out = torch.empty(blocks * threads, device="cuda")
    flop = {"ffma": 2 * 32, "mma_tf32": 2 * 16 * 8 * 8, "mma_bf16": 2 * 16 * 8 * 16}  # per warp and instruction
    for name, each in flop.items():
        times = microseconds(lambda name=name: kernels(name, out, blocks, iterations), repeats=10)
        result[name] = {"us": times, "TFLOP_per_s": rate(each * 8 * iterations * blocks * threads / 32, times)}
    return result


def grid_barrier() -> dict[str, Any]:
    """One barrier over the whole grid at one block per multiprocessor, in microseconds."""
    kernels = ProbeKernels()
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    blocks, result = torch.cuda.get_device_properties(0).multi_processor_count, {}
    for threads in (128, 256, 512):
        few, many = (
            microseconds(lambda t=threads, n=n: kernels("barriers", counter, blocks, t, n)) for n in (10, 1010)
        )
        result[f"{threads} threads"] = round((many["median"] - few["median"]) / 1000, 3)
    if counter.item() != 1010:
        raise RuntimeError("the barrier kernel did not finish")
    return result


# ----------------------------------------------------------------------------------------------------------- launches


def triton_touch() -> Callable[[torch.Tensor], None]:
    """A Triton kernel that adds 1 to one number, new at every call of this function: its first launch loads it."""
    source = (
        "import triton\nimport triton.language as tl\n\n@triton.jit\ndef touch(x):\n    tl.store(x, tl.load(x) + 1)\n"
    )
    path = Path(tempfile.mkdtemp()) / "touch.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("touch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda x: module.touch[(1,)](x)


def launches() -> dict[str, Any]:
    """Host time of one launch from Python, and the time of one kernel in a graph of 100."""
    x = torch.zeros(1, device="cuda")
    value = torch.zeros(1, dtype=torch.int32, device="cuda")
    calls: dict[str, Callable[[], Any]] = {"torch op": lambda: x.add_(1)}
    if version_of("triton"):
        touch = triton_touch()
        calls["triton kernel"] = lambda: touch(x)
    if shutil.which("nvcc"):
        kernels = ProbeKernels()
        calls["CUDA kernel through ctypes"] = lambda: kernels("touch", value)
    result: dict[str, Any] = {}
    for name, call in calls.items():
        result[name] = {"host_us": host_microseconds(call), "back_to_back_us": microseconds(call, inner=100)}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(100):
                call()
        replay = microseconds(graph.replay)
        result[name]["in_graph_us"] = round(replay["median"] / 100, 3)
    return result


def capture_on_first_use() -> dict[str, str]:
    """Whether a kernel may be used for the first time in its process while a stream is being captured.

    In a process of its own, as a capture that failed may leave its process unable to go on.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--only", FIRST_USE, "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, env=environment, capture_output=True, timeout=120, check=True)
        return json.loads(out.read_text())["cases"][FIRST_USE]


def capture_on_first_use_here() -> dict[str, str]:
    """What capture_on_first_use runs."""
    value, x = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.zeros(1, device="cuda")
    calls: dict[str, Callable[[], Any]] = {}
    if shutil.which("nvcc"):
        kernels = ProbeKernels()
        kernels("touch", value)  # the library and its context are there, the other kernel is not loaded
        calls["CUDA kernel"] = lambda: kernels("touch_first_in_capture", value)
    if version_of("triton"):
        triton_touch()(x)
        calls["triton kernel"] = lambda: triton_touch()(x)
    result = {}
    for name, call in calls.items():
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            graph.replay()
            torch.cuda.synchronize()
            result[name] = "works"
        except Exception as error:
            result[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return result


# ---------------------------------------------------------------------------------------------------------- baselines


def baseline(name: str, contestant: str, device: str, rounds: int = 7) -> dict[str, Any]:
    """One contestant at one shape: milliseconds forward and training, peak memory beyond inputs, errors."""
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
    (t,) = benchmarking.compare(**SHAPES[name]._asdict(), device=device, rounds=rounds, names=[contestant])
    if t.refused:
        return {"sizes": SHAPES[name], "refused": t.refused}
    result: dict[str, Any] = {"sizes": SHAPES[name], "error": t.error, "gradient_error": t.gradient_error}
    for mode in ("forward", "training"):
        result[f"{mode}_ms"] = summary(getattr(t, mode))
    if t.peak is not None:
        result["training_peak_MB"] = round(t.peak / 1e6, 1)
    return result


def tests(timeout: float) -> dict[str, Any]:
    """Every test that runs on CUDA tensors, with the backends that exist."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-k", "cuda", "tests"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    start = time.monotonic()
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {timeout:.0f} s"}
    tail = run.stdout.splitlines()[-15:]
    return {"exit_status": run.returncode, "seconds": round(time.monotonic() - start, 1), "tail": tail}


# --------------------------------------------------------------------------------------------------------------- main


def cases(device: str, deadline: float) -> dict[str, Callable[[], Any]]:
    """All cases, the most telling first: what does not fit into the time is left out at the end."""
    todo: dict[str, Callable[[], Any]] = {"machine": machine}
    if device == "cuda":
        probes = (copy, matmul, instructions, grid_barrier, launches, capture_on_first_use)
        todo |= {probe.__name__: probe for probe in probes}
    names = list(benchmarking.contestants(3))
    eager = [name for name in names if "compiled" not in name]
    pairs = [(shape, name) for shape in SHAPES for name in eager]
    pairs[2:2] = [("paper", name) for name in names if name not in eager]
    for shape, name in pairs:
        todo[f"{shape}: {name}"] = lambda shape=shape, name=name: baseline(shape, name, device)
    if device == "cuda":
        todo["tests"] = lambda: tests(max(60.0, deadline - time.monotonic()))
    for shape in list(SHAPES)[1:]:
        for name in names:
            if name not in eager:
                todo[f"{shape}: {name}"] = lambda shape=shape, name=name: baseline(shape, name, device)
    return todo


def main() -> int:
    """Run the cases within the time limit; the file is rewritten after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=400, help="start no case after this time (default: 400)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the probe itself")
    parser.add_argument("--only", default="", help="cases to run, separated by commas")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-probe-NAME.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu-probe: torch sees no CUDA device here; nothing was measured", file=sys.stderr)
        return 1
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    out = arguments.out or RESULTS / f"gpu-probe-{gpu.lower().replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    todo = cases(arguments.device, start + arguments.seconds)
    only = [name.strip() for name in arguments.only.split(",") if name.strip()]
    if only == [FIRST_USE]:
        todo = {FIRST_USE: capture_on_first_use_here}
    unknown = [name for name in only if name not in todo]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are: {', '.join(todo)}")
    results: dict[str, Any] = {"command": "make gpu-probe", "cases": {}}
    for name in only or todo:
        if time.monotonic() - start > arguments.seconds:
            results["cases"][name] = {"left_out": "no time left"}
        else:
            try:
                results["cases"][name] = todo[name]()
            except Exception as error:  # a case that fails is a result; the others go on
                results["cases"][name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
                if arguments.device == "cuda":
                    torch.cuda.empty_cache()
        results["seconds"] = round(time.monotonic() - start, 1)
        temporary = out.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(out)
        print(f"{time.monotonic() - start:6.1f} s  {name}: {json.dumps(results['cases'][name])[:300]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
