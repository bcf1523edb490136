"""What Triton's compiler makes of the kernels: spills, shared memory, instructions, beside the committed table."""

import json
import math
from pathlib import Path

import pytest
import torch
from support.numerics import TILES, Case, case_id, make_inputs

from fastcaps.routing.dynamic.arguments import Options, Tensors
from fastcaps.routing.dynamic.reference import output_capsules

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton", reason="Triton is not installed: it is for Linux only")
launch = pytest.importorskip("fastcaps.routing.dynamic.triton.launch")
parameters = pytest.importorskip("fastcaps.routing.dynamic.triton.parameters")
tuning = pytest.importorskip("fastcaps.routing.dynamic.triton.tuning")

pytestmark = pytest.mark.static


@pytest.fixture(scope="module")
def rows():
    """What the compiler makes of the kernels of the benchmark's sizes (but those that differ little from others)."""
    from gpu_static import CAPABILITIES, table

    return table(["paper"], ["tf32", "bfloat16"], CAPABILITIES) + table(
        ["paper", "J=1000", "DeepCaps", "conv", "recommendation"], ["float32"], CAPABILITIES
    )


def name(row: dict) -> str:
    return f"{row['shape']}, {row['precision']}, {row['role']}, sm_{row['capability']}"


def test_nothing_is_spilled(rows):
    """No register in a loop; the assembler sometimes puts a few away before one and takes them back after it."""
    assert not [f"{name(row)}: {row['spilled_in_loops']} accesses" for row in rows if row["spilled_in_loops"]]
    assert not [f"{name(row)}: {row['stack']} bytes" for row in rows if row["stack"] > 16]


def test_shared_memory_fits(rows):
    from gpu_static import SHARED_MEMORY

    limit = min(SHARED_MEMORY.values())
    assert not [f"{name(row)}: {row['shared_memory']} bytes" for row in rows if row["shared_memory"] > limit]


def test_instructions_are_not_more_than_they_were(rows):
    """Per vote element, against the committed table; where a kernel got better, `make gpu-static` writes it anew."""
    from gpu_static import RESULTS, text

    committed = json.loads(RESULTS.read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the committed numbers are those of Triton {committed['triton']}")
    before = {name(row): row["per_element"] for row in committed["rows"]}
    now = {name(row): row["per_element"] for row in rows if "per_element" in row}
    print(text(rows))
    assert now.keys() <= before.keys()
    worse = [
        f"{key}: {count} {kind} instructions, {before[key][kind]} before"
        for key, counts in now.items()
        for kind, count in counts.items()
        if count > 1.03 * before[key][kind] + 0.02
    ]
    assert not worse


OPTIONS = [
    *TILES,
    Case(sizes=(18, 5, 3, 4, 6), prior="J", bias="J", mask=True, leaky=True),
    Case(sizes=(5, 6, 4, 20, 8), share="inputs", prior="IJ", mask=True, num_iterations=1),
    Case(sizes=(5, 4, 60, 3, 12), votes=True, leaky=True),
    Case(sizes=(5, 4, 10, 8, 16), num_iterations=7),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_option_compiles(dtype):
    """The interpreter forgives what the compiler does not."""
    import concurrent.futures

    import gpu_static

    jobs = {}
    for case in OPTIONS if dtype == torch.float32 else OPTIONS[::4]:
        for kernel, arguments in gpu_static.recorded(lambda case=case: meta_step(case, dtype)):
            wanted = (kernel.__name__, *gpu_static.specialisation(kernel, arguments), 90)
            jobs[str(wanted)] = case_id(case), wanted
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        futures = [(case, wanted[0], pool.submit(gpu_static.compiled, *wanted)) for case, wanted in jobs.values()]
        errors = [f"{case}, {kernel}: {future.exception()}" for case, kernel, future in futures if future.exception()]
    assert not errors


def test_what_is_compiled_here_is_what_triton_would_launch():
    """Types, constants and divisibility as Triton's own launcher finds them, and no argument that a kernel has not."""
    import gpu_static
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for shape in ("paper", "J=1000", "recommendation"):
        for kernel, arguments in gpu_static.launches(shape, "float32"):
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            _, found, options = bind(**arguments)
            types, _, divisible, ours = gpu_static.specialisation(kernel, arguments)
            for n, (parameter, (kind, *extra)) in enumerate(zip(kernel.params, found, strict=True)):
                assert kind == types[parameter.name], parameter.name
                entries = extra[0] if isinstance(kind, tuple) else None
                flat = {(n,): extra == ["D"]} if entries is None else {(n, m): e == "D" for m, e in enumerate(entries)}
                assert {place for place, divides in flat.items() if divides} == {
                    place for place in divisible if place[0] == n
                }, parameter.name
            assert options == ours


def meta_step(case: Case, dtype: torch.dtype) -> None:
    """A training step of a case on tensors without memory, as ``ops.py`` calls the ops."""
    import gpu_static

    inputs = make_inputs(case, dtype)
    tensors = {
        n: torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta") for n, x in inputs.tensors.items()
    }
    poses, weight = tensors.get("votes", tensors.get("poses")), tensors.get("weight")
    prior, bias = tensors.get("prior"), tensors.get("bias")
    B, I, J = *poses.shape[:2], output_capsules(poses, weight, prior, bias)
    if prior is not None:
        shape = (B, I, J) if prior.dim() == 3 and prior.shape[0] != 1 else (I, J)
        prior = prior.float().reshape(prior.shape[-len(shape) :]).expand(shape)
    bias = None if bias is None else bias.float().expand(J, -1)
    mask = None if inputs.mask is None else inputs.mask.to("meta")
    gpu_static.training_step(Tensors(poses, weight, prior, bias, mask), Options(**case.options))


def test_a_batch_of_another_size_needs_no_other_kernel(monkeypatch):
    """Sizes that change from call to call are no constants of a kernel."""
    import gpu_static

    compiled = []
    for B in (1, 7, 64, 100):
        monkeypatch.setitem(gpu_static.SHAPES, "any", ((B, 1152, 10, 8, 16), False))
        found = gpu_static.launches("any", "float32")
        compiled.append({str((kernel.__name__, gpu_static.specialisation(kernel, a))) for kernel, a in found})
    # 7 * 160 and 100 * 160 are multiples of 16, as those of all batches with D_out = 16 are
    assert all(other == compiled[0] for other in compiled)


def test_scratch_is_small(monkeypatch):
    """The memory contract: beside sums, V and gradients no buffer of the size of the logits, and none of the votes'."""
    import gpu_static

    sizes: list[int] = []
    new = launch.Call.new
    monkeypatch.setattr(launch.Call, "new", lambda call, *shape: sizes.append(math.prod(shape)) or new(call, *shape))
    for shape, (B, I, J, D_in, D_out), shared in ((name, *value) for name, value in gpu_static.SHAPES.items()):
        if B * I * J < 1e6:
            continue
        sizes.clear()
        gpu_static.launches(shape, "float32")
        weight = (1 if shared else I) * J * D_in * D_out
        partial = 132 * 8 * 16 * 8 * 16 * 16  # a tile of sums for each warp that fits on the GPU
        allowed = max(weight, 3 * 3 * I * B, 3 * B * J * max(D_in, D_out), partial)
        assert max(sizes) <= allowed, f"{shape}: {max(sizes)} numbers, allowed {allowed}"
        assert max(sizes) < B * I * J * D_out / 4, f"{shape}: {max(sizes)} numbers"
