"""Small calls of every Triton and native kernel under compute-sanitizer's tools.

    make gpu-sanitize

Exits 0 with the reason where there is no compute-sanitizer or it refuses the machine, 1 where it finds something.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROBE = "import torch; torch.zeros(8, device='cuda').add_(1).sum().item()"
REFUSALS = ("Device not supported", "not supported on this", "Unable to find", "no CUDA-capable device")


def run(tool: str, *command: str) -> subprocess.CompletedProcess:
    """A command under a tool; 9 says that the tool found something."""
    # Every tensor in an allocation of its own, so that a read past its end is one past an allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return subprocess.run(
        [*sanitizer, sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def main() -> int:
    """Run the tools, initcheck and synccheck on the native kernels only: they are slow, and Triton's are generated."""
    if shutil.which("compute-sanitizer") is None:
        print("gpu-sanitize: skipped, there is no compute-sanitizer on the PATH")
        return 0
    probe = run("memcheck", "-c", PROBE)
    if probe.returncode and any(words in probe.stdout + probe.stderr for words in REFUSALS):
        print(f"gpu-sanitize: skipped, compute-sanitizer refuses this machine: {(probe.stdout + probe.stderr)[-300:]}")
        return 0
    worst = 0
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        chosen = "every_kernel" if tool in ("memcheck", "racecheck") else "every_kernel and native"
        result = run(tool, "-m", "pytest", "-x", "tests/gpu", "-k", chosen, "--timeout", "200")
        print(f"{tool}: exit {result.returncode}\n{result.stdout[-2500:]}{result.stderr[-500:]}", flush=True)
        worst |= result.returncode
    return int(worst != 0)


if __name__ == "__main__":
    sys.exit(main())
