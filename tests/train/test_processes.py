"""Several processes and parts of a batch: they end where one process does."""

import functools
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.processes import python
from support.training_runs import SMALL, assert_same, course, train

pytestmark = [pytest.mark.train, pytest.mark.process]

SUPPORT = Path(__file__).parents[1] / "support"


def run(*command: str, status: int = 0, **environment: str) -> None:
    done = python("-m", *command, OMP_NUM_THREADS="1", **environment)
    assert done.returncode == status, done.stderr


def as_srun_would(*options: str) -> None:
    """Two processes that SLURM's variables tell of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "training", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}
    told |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    # Not forked: Lightning asks for the rank when it is imported.
    with ThreadPoolExecutor() as threads:
        start = functools.partial(run, "fastcaps.cli", "train", *options, **told)
        list(threads.map(lambda n: start(SLURM_PROCID=n, SLURM_LOCALID=n), ("0", "1")))


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU core")
@pytest.mark.usefixtures("no_figures")
def test_two_processes_are_one(tmp_path):
    options = [*SMALL, "--epochs", "2", "--precision", "64", "--schedule", "constant"]  # 22 steps
    assert train(tmp_path / "one", *options) == 0
    run("fastcaps.cli", "train", *options, "--devices", "2", "--out", str(tmp_path / "two"))
    assert_same(tmp_path / "one", tmp_path / "two", 1e-9)
    as_srun_would(*options, "--out", str(tmp_path / "slurm"))
    assert_same(tmp_path / "one", tmp_path / "slurm", 1e-9)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    half = tmp_path / "torchrun"
    stopped = (*torchrun[:-1], str(SUPPORT / "interrupted.py"), "SIGTERM@1", "15")  # a signal to the second alone
    run(*stopped, *options, "--accumulate", "2", "--out", str(half), status=1)
    assert torch.load(half / "last.ckpt", weights_only=True)["global_step"] == 16
    run(*torchrun, "fastcaps.cli", "train", "--resume", "--out", str(half))
    assert_same(tmp_path / "one", half, 1e-9)
    errors = [[row["test_error"] for row in course(out) if "test_error" in row] for out in (tmp_path / "one", half)]
    assert len(errors[0]) == 2
    assert errors[0] == errors[1]


@pytest.mark.usefixtures("no_figures")
def test_parts_of_a_batch_add_up(tmp_path):
    options = [*SMALL, "--epochs", "1", "--precision", "64"]
    assert train(tmp_path / "whole", *options) == 0
    assert train(tmp_path / "parts", *options, "--accumulate", "4") == 0
    assert_same(tmp_path / "whole", tmp_path / "parts", 1e-9)
