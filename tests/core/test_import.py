"""What ``import fastcaps`` loads: PyTorch and the layers, nothing that takes long and nothing optional."""

from pathlib import Path

import pytest
import torch
from support.processes import python

from fastcaps.routing.backend import constant_when_traced

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]

LOADED = """
import sys
import torch
before = set(sys.modules)
import fastcaps
print(*sorted(set(sys.modules) - before))
"""


def modules_loaded() -> set[str]:
    result = python("-c", LOADED)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_import_loads_nothing_heavy_and_no_other_part():
    loaded = modules_loaded()
    assert "fastcaps.routing.dynamic.ops" in loaded
    for heavy in ("torch._dynamo", "torch._inductor", "triton", "sympy", "safetensors", "lightning", "matplotlib"):
        assert not {name for name in loaded if name == heavy or name.startswith(f"{heavy}.")}
    for part in ("convert", "train", "data", "doctor", "benchmarking", "cli"):
        assert f"fastcaps.{part}" not in loaded


def test_a_constant_for_dynamo_is_marked_as_pytorch_marks_it():
    """The mark is PyTorch's own, and its name is not public."""

    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert constant_when_traced(ours) is ours
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
