"""The native CUDA kernels in their emulation: the order of threads, the number of launches, index arithmetic.

Their numbers are those of test_dynamic_routing.py with FASTCAPS_EMULATE_CUDA=1 in the environment.
"""

import ctypes
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from support import emulated_cuda
from support.numerics import EVERY_KERNEL, Case, backend_op, case_id, check, make_inputs, run

from fastcaps.exactness import error_budget, relative_error
from fastcaps.functional import squash
from fastcaps.routing import backend as backends
from fastcaps.routing.dynamic import ops

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.emulated


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
    """A missing barrier shows when the threads of a block run in one order or in the other: with all iterations in one
    launch, and with one for each sweep. Both give the same bits but for a ring, which has slices of its own."""
    inputs, found = make_inputs(case, dtype), {}
    for resident_blocks in (6, 0):
        monkeypatch.setattr(emulated_cuda, "resident_blocks", resident_blocks)
        monkeypatch.setattr(emulated_cuda, "descending", False)
        check(emulated, case, dtype)
        ascending = run(emulated, case, inputs, dtype, "cpu")
        monkeypatch.setattr(emulated_cuda, "descending", True)
        descending = run(emulated, case, inputs, dtype, "cpu")
        for name, value in ascending.items():
            assert torch.equal(value, descending[name]), name
        found[resident_blocks] = ascending
    by_ring = dtype == torch.float32 and case.sizes[0] >= 57 and case.prior == "none"
    for name, value in found[6].items():
        assert by_ring or torch.equal(value, found[0][name]), name


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


@pytest.mark.parametrize(
    ("sizes", "resident_blocks"), [((9, 12, 10, 8, 16), 6), ((9, 12, 10, 8, 16), 0), ((90, 4, 5, 8, 32), 0)], ids=str
)
@pytest.mark.parametrize("factor", [4.0, 1.7, -4.0])
def test_logits_whose_powers_of_two_overflow_or_vanish(emulated, monkeypatch, factor, sizes, resident_blocks):
    """The bias decides the outputs; the votes of one input capsule lie along it, or against it. With the factor in the
    middle sums do not overflow, but their products with large gradients would."""
    monkeypatch.setattr(emulated_cuda, "resident_blocks", resident_blocks)
    inputs = make_inputs(Case(sizes=sizes), torch.float64)
    poses, weight = (tensor.clone() for tensor in inputs.tensors.values())
    bias = 40 * torch.nn.functional.normalize(inputs.grad[0], dim=1)
    poses[:, 1], weight[1] = 0, 0
    poses[:, 1, 0], weight[1, :, :, 0] = factor, bias
    results = []
    reference = backend_op("reference")
    for op, dtype in ((emulated, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in (poses, weight, bias)]
        out = op(**dict(zip(("poses", "weight", "bias"), tensors, strict=True)), num_iterations=2)
        results.append([out, *torch.autograd.grad(out, tensors, 2**40 * inputs.grad.to(dtype))])
    V = squash(bias + torch.einsum("ijdk,bik->bjd", weight, poses) / sizes[2])
    logits = torch.einsum("bk,jdk,bjd->bj", poses[:, 1], weight[1], V) / math.log(2)
    assert (logits / factor > 50).all()
    for ours, plain, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) <= error_budget(torch.float32, relative_error(plain, exact), gradient=True)


@pytest.mark.parametrize("sizes", [(9, 40, 10, 8, 16), (9, 12, 20, 12, 32), (90, 4, 10, 8, 16)], ids=str)
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
