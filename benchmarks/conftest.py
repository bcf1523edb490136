"""Options and results of ``pytest benchmarks/``: what a result file holds, and the comparison with a committed one."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from machine import description

# A cache of compiled code of its own: PyTorch's does not tell apart what ATEN_CPU_CAPABILITY changes, and code that was
# compiled for other vectors gives NaN.
CACHE = tempfile.TemporaryDirectory()  # gone with this process
os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHE.name


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastcaps")
    group.addoption("--rounds", type=int, default=7, help="rounds in which the contestants take turns")
    group.addoption("--against", metavar="FILE", help="a result file whose ratios this run must keep")
    group.addoption("--worse", type=float, default=15.0, metavar="PERCENT", help="by how much ratios may fall")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Ours instead of theirs, which would name the machine."""
    machine_info.clear()
    machine_info.update(description())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Keep what the report and the comparison read."""
    output_json["benchmarks"] = [
        {
            "name": b["name"],
            **b["extra_info"],
            **{f"{key}_ms": 1e3 * b["stats"][key] for key in ("median", "min", "max")},
            "rounds": b["stats"]["rounds"],
        }
        for b in output_json["benchmarks"]
    ]
    output_json["commit_info"] = {key: output_json["commit_info"].get(key) for key in ("id", "dirty")}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Exit 1 where a ratio to the fastest alternative fell by more than ``--worse`` percent."""
    against, measured = session.config.getoption("--against"), getattr(session.config, "_fastcaps_ratios", {})
    if against is None or exitstatus != 0:
        return
    before = json.loads(Path(against).read_text())["benchmarks"]
    least = 1 - session.config.getoption("--worse") / 100
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    compared = 0
    for b in before:
        if "ratio" not in b:
            continue
        if b["name"] not in measured:
            reporter.write_line(f"not compared, as it was not measured: {b['name']}")
            continue
        compared += 1
        now = measured[b["name"]]
        if now < least * b["ratio"]:
            reporter.write_line(f"worse: {b['name']}: {now:.2f} times the fastest alternative, {b['ratio']:.2f} before")
            session.exitstatus = 1
    reporter.write_line(f"{compared} ratios compared with {against}")
    if not compared:
        session.exitstatus = 1
