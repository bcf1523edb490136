"""Further processes with the fastcaps of this checkout; pytest's timeout ends what hangs."""

import functools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

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


@functools.cache
def _fork_server() -> ForkServerContext:
    """A process that has imported the trainer, which takes seconds, and has run nothing: its forks are as if new."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastcaps.train.run"])
    return context


class Forked:
    """A function in a process of its own, which has the trainer already.

    Args:
        function: returns the exit status.
        arguments: for it.
        stderr: the file that its errors go to.
    """

    def __init__(self, function: Callable[..., int], *arguments: Any, stderr: Path) -> None:
        self.stderr = stderr
        self.process = _fork_server().Process(target=_run, args=(function, arguments, stderr))
        self.process.start()

    def wait(self) -> tuple[int, str]:
        """The exit status, or minus the signal that ended it, and what it wrote to stderr."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode, self.stderr.read_text()


def _run(function: Callable[..., int], arguments: tuple[Any, ...], stderr: Path) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(function(*arguments))
