"""The native CUDA kernels where there is no GPU: what only the emulation can show, machine code, index maths.

Their numbers are those of test_dynamic_routing.py with FASTCAPS_EMULATE_CUDA=1 in the environment.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import emulated_cuda
from support.numerics import EVERY_KERNEL, Case, backend_op, case_id, check, make_inputs, run

from fastcaps.exactness import relative_error
from fastcaps.routing import backend as backends
from fastcaps.routing.backend import choose_backend, why_unavailable
from fastcaps.routing.dynamic import ops

ROOT = Path(__file__).parents[2]

# -------------------------------------------------------------------------------------------------------- the emulation


@pytest.fixture
def emulated(monkeypatch):
    """The native backend on CPU tensors is the CUDA kernels."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(ops, "op", lambda backend, direction: getattr(emulated_cuda, direction))
    return backend_op("native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EVERY_KERNEL["native"], ids=case_id)
def test_the_order_of_threads_changes_nothing(emulated, monkeypatch, case, dtype):
    """A missing barrier shows when the threads of a block run in one order or in the other; nor does it matter whether
    all iterations are in one launch."""
    check(emulated, case, dtype)
    inputs = make_inputs(case, dtype)
    ascending = run(emulated, case, inputs, dtype, "cpu")
    monkeypatch.setattr(emulated_cuda, "descending", True)
    for resident_blocks in (6, 0):
        monkeypatch.setattr(emulated_cuda, "resident_blocks", resident_blocks)
        descending = run(emulated, case, inputs, dtype, "cpu")
        for name, value in ascending.items():
            assert torch.equal(value, descending[name]), name


def test_one_launch_where_all_blocks_are_resident_and_one_for_each_sweep_elsewhere(emulated, monkeypatch):
    def launches(*sizes: int, num_iterations: int = 3) -> list[int]:
        case = Case(sizes=sizes, num_iterations=num_iterations)
        poses, weight = make_inputs(case, torch.float32).tensors.values()
        out, sums = emulated_cuda.forward(poses, weight, None, None, None, num_iterations, False, False, 0.0)
        found = [emulated_cuda.launches]
        flags = (False, False, 0.0, True, True, False, False)
        emulated_cuda.backward(out, poses, weight, None, None, None, sums, *flags)
        return [*found, emulated_cuda.launches]

    assert launches(40, 32, 10, 8, 16) == [1, 2]  # and the last sweep
    assert launches(40, 6, 10, 8, 16) == [1, 3]  # and the sums of what blocks share
    assert launches(40, 32, 10, 8, 16, num_iterations=5) == [1, 2]
    assert launches(40, 32, 10, 8, 16, num_iterations=1) == [2, 3]
    assert launches(40, 32, 11, 8, 16) == [2 * 3 + 2, 1 + 3 + 2 * 2 + 1]  # several tiles: statistics first
    assert launches(40, 160, 10, 8, 16) == [6, 1 + 3 + 2 + 1]  # too much for the shared memory
    monkeypatch.setattr(emulated_cuda, "resident_blocks", 1)
    assert launches(40, 32, 10, 8, 16) == [6, 1 + 3 + 2 + 1]


@pytest.mark.parametrize("resident_blocks", [200, 0])
def test_as_many_slices_as_on_a_large_gpu(emulated, monkeypatch, resident_blocks):
    """Of the sums over 64 slices a warp takes eight at a time."""
    monkeypatch.setattr(emulated_cuda, "multiprocessors", 30)
    monkeypatch.setattr(emulated_cuda, "resident_blocks", resident_blocks)
    check(emulated, Case(sizes=(9, 70, 10, 8, 16), num_iterations=2), torch.float32)


@pytest.mark.parametrize("sizes", [(9, 40, 10, 8, 16), (9, 12, 20, 12, 32)], ids=str)
def test_tf32_is_rounded_and_as_exact_as_that_is(emulated, monkeypatch, sizes):
    from fastcaps.routing.dynamic import api

    case = Case(sizes=sizes)
    inputs = make_inputs(case, torch.float32)
    exact = run(backend_op("reference"), case, inputs, torch.float64, "cpu")
    monkeypatch.setattr(api, "allows_tf32", lambda poses: True)
    rounded = run(emulated, case, inputs, torch.float32, "cpu")
    for name, value in exact.items():
        assert 1e-5 < relative_error(rounded[name], value) < 5e-3, name


@pytest.mark.parametrize("share", ["none", "inputs"])
def test_wide_vectors_fit_into_shared_memory(emulated, share):
    """Of GPUs that have 99 KB of it, up to the limit that the choice of a backend knows."""
    if share == "none":
        check(emulated, Case(sizes=(2, 3, 2, 4, backends.CUDA_D), votes=True), torch.float64)
    else:
        check(emulated, Case(sizes=(2, 3, 2, backends.CUDA_D, 3), share=share), torch.float64)


def test_index_maths(emulated):
    check_index_maths = emulated_cuda.library().check_index_maths
    check_index_maths.restype = ctypes.c_char_p
    assert check_index_maths() is None


# -------------------------------------------------------------------------------------------------------- machine code


@pytest.fixture(scope="module")
def rows():
    """What the compiler made of every kernel of the extension that is installed, for each architecture."""
    if "CUDA" not in (backends.EXTENSION_BUILD or ""):
        pytest.skip("the extension was built without CUDA kernels: there was no CUDA toolkit")
    pytest.importorskip("triton", reason="the tools that read machine code come with Triton")
    from cuda_static import table

    return table(["sm_80", "sm_90", "sm_100", "sm_120"])


def test_every_architecture_has_every_kernel(rows):
    names = {}
    for row in rows:
        names.setdefault(row["architecture"], set()).add(row["kernel"])
    assert sorted(names) == ["sm_100", "sm_120", "sm_80", "sm_90"]
    assert all(kernels == names["sm_90"] for kernels in names.values())
    assert len(names["sm_90"]) > 100


def name(row: dict) -> str:
    return f"{row['kernel']}, {row['architecture']}"


def test_nothing_is_spilled_in_a_loop(rows):
    """A register or two may wait outside of the loops for the usual sizes, some more of those where priors, masks and
    further entries of D_in are looked for. There a round takes one from memory at most; in the last sweep, with its
    255, up to five."""
    tiles = [row for row in rows if row["kernel"].startswith("tile_")]
    assert not [name(row) for row in tiles if row["stack"] > (16 if ", true>, Tile" in row["kernel"] else 48)]
    for row in tiles:
        limit = 0 if ", true>, Tile" in row["kernel"] else 5 if "gradients" in row["kernel"] else 1
        assert row["unit"]["local"] <= limit, name(row)


def test_registers_let_the_promised_blocks_be_resident(rows):
    """Three blocks of 128 threads for the sweeps of the forward, two for those of the backward."""
    for row in rows:
        if row["kernel"].startswith("tile_"):
            backward = "gradients" in row["kernel"] or row["kernel"].endswith("true>")
            assert row["registers"] <= (255 if backward else 168), name(row)


def test_instructions_are_those_of_the_design(rows):
    """Of a unit, one input capsule for 8 samples: a product of 16 x 8 for every 16 rows of the tile, three of them
    where float32 is exact; 16 bytes at a time from shared memory; and no more of anything than was committed."""
    from cuda_static import RESULTS, compiler

    plain = [row for row in rows if row["kernel"].startswith("tile_") and ", true>, Tile" in row["kernel"]]
    assert len(plain) == 4 * 4 * 3 * 6  # architectures, forms, tiles, kernels
    for row in plain:
        m = 8 if "Tile<8" in row["kernel"] else 10
        products = 3 if "<float, false" in row["kernel"] else 1
        gradients = "gradients" in row["kernel"]
        of_gradients = {"float, false": 3, "float, true": 1, "bfloat16": 1, "float16": 2}
        second = next(n for form, n in of_gradients.items() if f"Form<{form}" in row["kernel"])
        assert row["unit"]["matrix"] == m * (products + second if gradients else products), name(row)
        assert row["unit"]["LDS 16 bytes"] == (5 * m if gradients else m), name(row)
        of_a_pose = row["kernel"].startswith("tile_persistent")
        assert row["unit"]["LDS"] == row["unit"]["LDS 16 bytes"] + of_a_pose, name(row)
    committed = json.loads(RESULTS.read_text())
    if committed["nvcc"] != compiler():
        pytest.skip(f"what was committed is of nvcc {committed['nvcc']}: another one's instructions differ")
    before = {(row["kernel"], row["architecture"]): row["unit"] for row in committed["rows"]}
    worse = [
        f"{name(row)}: {count} {kind}, {before[row['kernel'], row['architecture']][kind]} before"
        for row in plain
        for kind, count in row["unit"].items()
        if "bytes" not in kind and count > 1.03 * before[row["kernel"], row["architecture"]][kind] + 2
    ]
    assert not worse


# ----------------------------------------------------------------------------------------------------------- the choice


@pytest.fixture
def a_gpu(monkeypatch):
    """As if there were one, with native kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "ENVIRONMENT", None)
    monkeypatch.setattr(backends, "_why_no_native_cuda", lambda device: None)
    backends._look_for_triton.cache_clear()
    yield torch.device("cuda", 0)
    backends._look_for_triton.cache_clear()


def test_cuda_tensors_go_to_the_native_kernels(a_gpu, monkeypatch):
    assert choose_backend(None, a_gpu) == "native"
    assert choose_backend("native", a_gpu, torch.float64) == "native"
    assert choose_backend(None, a_gpu, torch.float64) == "native"
    assert choose_backend(None, a_gpu, torch.float32, 513) == "native"
    assert choose_backend(None, a_gpu, torch.float32, 4097) == "reference"
    with pytest.raises(ValueError, match="vectors of up to 4096 entries, got 4097"):
        choose_backend("native", a_gpu, torch.float32, 4097)
    monkeypatch.setattr(backends, "_why_no_native_cuda", lambda device: "built without CUDA")
    monkeypatch.setattr(backends, "_warned", True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # there is no Triton where the program runs
    assert choose_backend(None, a_gpu) == "reference"


def test_no_cuda_kernels_and_no_gpu_are_said_with_a_cure(monkeypatch):
    look = backends._look_for_native_cuda.__wrapped__
    monkeypatch.setattr(backends, "EXTENSION_BUILD", "CPU (x86_64), built with torch 2.13.0")
    assert "FASTCAPS_CUDA=1 pip install" in look(torch.device("cuda", 0))
    monkeypatch.undo()
    if not torch.cuda.is_available() and "CUDA" in backends.EXTENSION_BUILD:
        assert why_unavailable("native", "cuda") == "PyTorch sees no CUDA device"


@pytest.mark.parametrize(
    ("wanted", "where", "message"),
    [
        ("yes", {}, "FASTCAPS_CUDA must be auto, 0 or 1, got 'yes'"),
        ("1", {"CUDA_HOME": "/nowhere"}, "there will be no CUDA kernels: no CUDA toolkit (/nowhere/bin/nvcc"),
        ("1", {"CXX": "/nowhere/g++"}, "there will be no CUDA kernels: no C++ compiler (/nowhere/g++"),
    ],
    ids=["neither", "no toolkit", "no compiler"],
)
def test_a_build_that_must_have_cuda_says_why_it_fails(tmp_path, wanted, where, message):
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastcaps", "csrc"):
        source = ROOT / part
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / part)
    environment = {**os.environ, "FASTCAPS_CUDA": wanted, **where}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-temp", "temp", "--build-lib", "out"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert message in result.stderr
