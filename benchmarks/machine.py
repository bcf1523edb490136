"""What the machine is and what it could do at most."""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fastcaps

HERE = Path(__file__).parent


def instruction_set() -> str:
    """What the native kernels use here: avx512, avx2 or default."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    return best if best in ("avx512", "avx2") else "default"


@cache
def _peak_library() -> Any:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    library = Path(tempfile.mkdtemp()) / "fma_peak.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", HERE / "fma_peak.cpp", "-o", library], check=True)
    function = ctypes.CDLL(str(library)).fma_peak
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_char_p, ctypes.c_double]
    return function


def fma_peak(seconds: float = 0.2) -> float:
    """GFLOP/s in float32 of all PyTorch threads together, from registers alone; 0 where it cannot be measured."""
    function = _peak_library()
    if function is None:
        return 0.0
    found = [0.0] * torch.get_num_threads()

    def run(n: int) -> None:
        found[n] = function(instruction_set().encode(), seconds)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(found)


def processor() -> str:
    """Name, family and model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split("\t: ", 1) for line in lines if "\t: " in line)
    fields = {key.strip(): value for key, value in fields.items()}
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())}, {family}"


def description(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge the numbers, and nothing that names the machine."""
    return ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}) | {
        "processor": processor(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastcaps": fastcaps.__version__,
    }


def commit() -> str:
    """Of the code that was measured; empty outside a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    print(instruction_set())
