"""The CUDA kernels without a GPU: compiled for the host (emulated_cuda.cpp), called with CPU tensors.

With FASTCAPS_EMULATE_CUDA=1 in the environment the tests run them in the place of the native CPU kernels.
"""

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from fastcaps.functional import compute_dtype
from fastcaps.routing.dynamic.reference import output_capsules

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WANTED = os.environ.get("FASTCAPS_EMULATE_CUDA") == "1"
STORED = {torch.float64: 0, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

descending = False  # the order in which the threads of a block run
resident_blocks = 6  # how many blocks may wait for each other
multiprocessors = 2
launches = 0  # kernels, in the last call


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled when they have changed."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    assert compiler is not None, "there is no C++ compiler"
    built = ROOT / "build" / "emulated_cuda.so"
    sources = [*(ROOT / "csrc").glob("cuda/*"), *(ROOT / "csrc").glob("*.h"), *HERE.glob("*cuda*")]
    if not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        built.parent.mkdir(exist_ok=True)
        flags = ["-std=c++20", "-O1", "-g1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
        places = [f"-I{ROOT / 'csrc'}", f"-I{HERE}", HERE / "emulated_cuda.cpp"]
        temporary = built.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *flags, "-Wno-clobbered", *places, "-o", temporary], check=True)
        temporary.replace(built)
    return ctypes.CDLL(str(built))


def call(
    is_backward: bool,
    poses: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    options: tuple[int, bool, bool, float, bool],
    results: list[Tensor | None],
) -> None:
    """Run a direction on contiguous tensors; what is not given is null."""
    global launches
    num_iterations, leaky, detach, eps, allow_tf32 = options
    J = output_capsules(poses, weight, prior, bias)
    B, I = poses.shape[:2]
    D_in, D_out = (0, poses.shape[3]) if weight is None else (poses.shape[2], weight.shape[2])
    matrix = D_out * (D_in if weight is not None else 1)
    stride_j = 0 if (poses.shape[2] if weight is None else weight.shape[1]) == 1 else matrix
    stride_i = 0 if weight is None or weight.shape[0] == 1 else weight.shape[1] * matrix
    numbers = [B, I, J, D_in, D_out, num_iterations, STORED[poses.dtype], stride_i, stride_j]
    numbers += [I * J if prior is not None and prior.dim() == 3 else 0, leaky, detach, allow_tf32]
    numbers += [descending, resident_blocks, multiprocessors]
    tensors = [poses, weight, prior, bias, mask, *results]
    assert all(x is None or x.is_contiguous() for x in tensors)
    pointers = (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors])
    launches = library().emulated_dynamic_routing(
        int(poses.dtype == torch.float64),
        int(is_backward),
        (ctypes.c_int64 * len(numbers))(*map(int, numbers)),
        pointers,
        ctypes.c_double(eps),
    )


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


def forward(poses, weight, prior, bias, mask, num_iterations, leaky, detach, eps, allow_tf32=False):
    """As the native op."""
    inputs = contiguous(poses, weight, prior, bias, mask)
    J = output_capsules(*inputs[:4])
    D_out = poses.shape[3] if weight is None else weight.shape[2]
    out = torch.full((poses.shape[0], J, D_out), torch.nan, dtype=poses.dtype)
    sums = torch.full((num_iterations, *out.shape), torch.nan, dtype=compute_dtype(poses.dtype))
    call(False, *inputs, (num_iterations, leaky, False, eps, allow_tf32), [out, sums, *[None] * 4])
    return out, sums


def backward(grad, poses, weight, prior, bias, mask, sums, leaky, detach, eps, *flags):
    """As the native op."""
    needed, allow_tf32 = flags[:4], len(flags) > 4 and flags[4]
    inputs = contiguous(poses, weight, prior, bias, mask)
    found = [
        torch.full_like(x, torch.nan) if x is not None and need else None
        for x, need in zip(inputs[:4], needed, strict=True)
    ]
    call(True, *inputs, (sums.shape[0], leaky, detach, eps, allow_tf32), [*contiguous(grad, sums), *found])
    return tuple(poses.new_empty(0) if x is None else x for x in found)
