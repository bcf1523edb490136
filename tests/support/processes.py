"""Python in a process of its own, with the fastcaps of this checkout; pytest's timeout ends what hangs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(
    *arguments: str | Path, cwd: Path = ROOT, without: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` with environment variables added, and others taken away."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={name: value for name, value in variables.items() if name not in without},
        capture_output=True,
        text=True,
        check=False,
    )
