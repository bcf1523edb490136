"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, shared memory, instructions.

    make gpu-static    # prints the table and writes benchmarks/results/triton-static.json, with which a test compares

The launches are those that the op would do: it runs on tensors without memory, and each launch is compiled instead. Of
a kernel's loops the one with most instructions is counted, per vote element (one entry of one vote of one sample) and
warp lane, so that 1.0 is one instruction for 32 of them.
"""

import argparse
import collections
import concurrent.futures
import json
import re
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_static
import sass
import torch
import triton
import triton.language as tl
from gpu_bench import PRECISIONS, SHAPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcaps.routing.dynamic.arguments import DIFFERENTIABLE, Options, Tensors
from fastcaps.routing.dynamic.triton import gradients, launch, sweeps, vectors

RESULTS = Path(__file__).parent / "results" / "triton-static.json"
TOOLS = cuda_static.TOOLS
CAPABILITIES = [80, 90, 100]
# Bytes that a block may have: compute capability -> limit. The same kernels run on 8.6, 8.9 and 12.0.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

CLASSES = {
    "matrix": ("HMMA", "HGMMA"), "FFMA": ("FFMA", "FMUL", "FADD"), "special": ("MUFU",), "shuffle": ("SHFL",),
    "shared": ("LDS", "STS", "LDSM", "STSM"), "global": ("LDG", "STG", "LDGSTS"), "local": ("LDL", "STL"),
}  # fmt: skip


def recorded(call: Callable[[], Any], multiprocessors: int = 132) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that a call on meta tensors would launch, with their arguments; each specialisation once."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}

    def record(kernel: Any, programs: int, **arguments: Any) -> None:
        found.setdefault(str((kernel.__name__, specialisation(kernel, arguments))), (kernel, arguments))

    with (
        unittest.mock.patch.object(launch, "launch", record),
        unittest.mock.patch.object(launch, "_gpu", return_value=("none", multiprocessors)),
    ):
        call()
    return list(found.values())


def training_step(tensors: Tensors, options: Options) -> None:
    """Forward and backward, all gradients wanted."""
    out, sums = launch.forward(tensors, options)
    wanted = [name for name in DIFFERENTIABLE if getattr(tensors, name) is not None]
    launch.backward(tensors, options, sums, out, wanted)


def launches(shape: str, precision: str) -> list[tuple[Any, dict[str, Any]]]:
    """What a training step of three iterations launches."""
    (B, I, J, D_in, D_out), shared = SHAPES[shape]
    like: dict[str, Any] = {"dtype": PRECISIONS[precision], "device": "meta"}
    tensors = Tensors(torch.empty(B, I, D_in, **like), torch.empty(1 if shared else I, J, D_out, D_in, **like))
    options = Options(num_iterations=3, leaky=False, detach=False, eps=0.0, allow_tf32=precision == "tf32")
    return recorded(lambda: training_step(tensors, options))


def specialisation(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict, list, dict[str, Any]]:
    """Types, constants, what 16 divides, and options, as Triton's own launcher finds them.

    Types are by name; constants and what 16 divides by place, ``(n,)`` or ``(n, m)`` in a tuple.
    """
    constants: dict[tuple[int, ...], Any] = {}
    divisible: list[tuple[int, ...]] = []
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1"}

    def type_of(value: Any, place: tuple[int, ...], plain: bool) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(type_of(entry, (*place, n), plain) for n, entry in enumerate(value)))
        if isinstance(value, tl.constexpr) or value is None or (type(value) is int and value == 1 and not plain):
            constants[place] = value.value if isinstance(value, tl.constexpr) else value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            divisible.append(place)
            return pointers[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and not plain:
            divisible.append(place)
        return "i32" if abs(value) < 2**31 else "i64"

    types = {}
    for n, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        value = tl.constexpr(value) if parameter.is_constexpr else value
        types[parameter.name] = type_of(value, (n,), parameter.do_not_specialize)
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    return types, constants, divisible, options


def compiled(name: str, types: dict, constants: dict, divisible: list, options: dict, capability: int) -> dict:
    """Registers, stack, shared memory and the instructions of the longest loop of one kernel."""
    kernel = getattr({"sweep": sweeps, "gradients": gradients}.get(name, vectors), name)
    source = ASTSource(kernel, types, constants, {place: [["tt.divisibility", 16]] for place in divisible})
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()  # type: ignore[union-attr]
    loop, spilled = loops(text)
    return {
        "registers": int(registers), "stack": int(stack), "spilled_in_loops": spilled,
        "shared_memory": result.metadata.shared, "loop": loop,
    }  # fmt: skip


def loops(text: str) -> tuple[dict[str, int], int]:
    """Instructions by class (and all, "slots") of the innermost loop that has most of them; and how many in any
    innermost loop reach into local memory, where spilled registers lie."""
    whole, found = cuda_static.instructions(text)
    names = [name.split(".")[0] for name in whole]
    innermost = sass.innermost(found)
    spilled = sum(name in CLASSES["local"] for a, b in innermost for name in names[a : b + 1])
    if not innermost:
        return {}, spilled
    first, last = max(innermost, key=lambda loop: loop[1] - loop[0])
    count = collections.Counter(names[first : last + 1])
    return {"slots": last + 1 - first, **{k: sum(count[i] for i in group) for k, group in CLASSES.items()}}, spilled


def per_element(row: dict[str, Any], arguments: dict[str, Any]) -> dict[str, float]:
    """The loop's instructions per vote element and lane."""
    capsules = min(arguments["J"], arguments["JG"] * arguments["JT"])
    elements = arguments["BB"] * capsules * arguments["D_OUT"]
    lanes = 32 * arguments["num_warps"]
    return {name: round(count * lanes / elements, 2) for name, count in row["loop"].items()}


def role(name: str, arguments: dict[str, Any]) -> str:
    """What a launch of a kernel is for."""
    if name != "sweep":
        return name
    kind = "dV" if arguments["ds"] is not None else "sum" if arguments["V"] is not None else "first sum"
    return f"{kind}{', statistics' if arguments['MODE'] == 'statistics' else ''}"


def table(shapes: list[str], precisions: list[str], capabilities: list[int], workers: int = 2) -> list[dict[str, Any]]:
    """A row for each kernel that these shapes launch, compiled for each compute capability."""
    jobs = []
    for shape in shapes:
        for precision in precisions:
            for kernel, arguments in launches(shape, precision):
                for capability in capabilities:
                    head = {
                        "shape": shape, "precision": precision, "kernel": kernel.__name__,
                        "role": role(kernel.__name__, arguments), "capability": capability,
                    }  # fmt: skip
                    jobs.append((head, arguments, (kernel.__name__, *specialisation(kernel, arguments), capability)))
    rows = []
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(compiled, *job) for _, _, job in jobs]
        for (head, arguments, _), future in zip(jobs, futures, strict=True):
            row = {**head, **future.result()}
            if head["kernel"] in ("sweep", "gradients") and row["loop"]:
                row["per_element"] = per_element(row, arguments)
            del row["loop"]
            rows.append(row)
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table: registers, bytes of stack, spill instructions in loops, bytes of shared memory, the loop."""
    columns = ["slots", *CLASSES]
    lines = [f"{'':>46} cc  regs stack loops shared " + " ".join(f"{c:>8}" for c in columns)]
    for r in rows:
        counts = " ".join(f"{r.get('per_element', {}).get(c, ''):>8}" for c in columns)
        name = f"{r['shape']}, {r['precision']}: {r['role']}"
        facts = f"{r['registers']:>4} {r['stack']:>5} {r['spilled_in_loops']:>5} {r['shared_memory']:>6}"
        lines.append(f"{name:>46} {r['capability']:>3} {facts} {counts}")
    return "\n".join(lines)


def main() -> int:
    """Print the table; with --write, keep it for the test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--precisions", default="float32,tf32,bfloat16")
    parser.add_argument("--capabilities", default=",".join(map(str, CAPABILITIES)))
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    shapes, precisions = arguments.shapes.split(","), arguments.precisions.split(",")
    rows = table(shapes, precisions, [int(c) for c in arguments.capabilities.split(",")])
    print(text(rows))
    if arguments.write:
        kept = [row for row in rows if "per_element" in row]
        lines = ",\n".join(json.dumps(row) for row in kept)
        RESULTS.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
