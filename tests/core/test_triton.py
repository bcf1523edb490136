"""The Triton backend where there is no GPU: its kernels from the compiler, launch parameters, the choice.

Its numbers are those of test_dynamic_routing.py and test_contracts.py with TRITON_INTERPRET=1 in the environment.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.numerics import TILES, Case, case_id, make_inputs
from support.processes import python

import fastcaps
from fastcaps import cli
from fastcaps.routing import backend as backends
from fastcaps.routing.backend import choose_backend, why_unavailable
from fastcaps.routing.dynamic.arguments import Options, Tensors
from fastcaps.routing.dynamic.reference import output_capsules

ROOT = Path(__file__).parents[2]
triton = pytest.importorskip("triton", reason="Triton is not installed: it is for Linux only")
launch = pytest.importorskip("fastcaps.routing.dynamic.triton.launch")
parameters = pytest.importorskip("fastcaps.routing.dynamic.triton.parameters")
tuning = pytest.importorskip("fastcaps.routing.dynamic.triton.tuning")

# -------------------------------------------------------------------------------------------------------- the compiler


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


# --------------------------------------------------------------------------------------------------------------- tuning


def test_the_table_comes_before_the_heuristic(monkeypatch, tmp_path):
    table = tmp_path / "tuned.json"
    monkeypatch.setattr(parameters, "TUNED", table)
    monkeypatch.setattr(tuning, "TUNED", table)
    monkeypatch.setattr(launch, "_gpu", lambda index: ("some GPU", 132))
    parameters.tuned.cache_clear()
    like = {"device": "meta"}
    tensors = Tensors(torch.empty(60, 9, 4, **like), torch.empty(9, 5, 16, 4, **like))
    call = launch.Call(tensors, Options(3, leaky=False, detach=False, eps=0.0))
    heuristic = call.parameters("sum")
    other = heuristic._replace(JG=4, JT=2, num_warps=4)
    tuning._write("some GPU", {call.key("sum", 0): other})
    parameters.tuned.cache_clear()
    try:
        assert call.parameters("sum") == other
        assert call.parameters("dV") != other
        monkeypatch.setattr(call, "gpu", "another GPU")
        assert call.parameters("sum") == heuristic
    finally:
        parameters.tuned.cache_clear()


@pytest.mark.parametrize("J", [1, 10, 100])
def test_candidates_are_tiles_that_cover_the_capsules(J):
    start = parameters.sweep_parameters(J, 8, 16, False, 3, 4)
    found = tuning.candidates(start, J)
    assert found[0] == start
    assert len(found) == len(set(found)) > 5
    for p in found:
        assert 1 <= p.num_warps <= 8
        tiles = -(-J // (p.JG * p.JT))
        assert (tiles - 1) * p.JG * p.JT < J <= tiles * p.JG * p.JT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_needs_a_gpu(capsys):
    assert cli.main(["tune", "2", "3", "4", "5", "6"]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ benchmark


def test_gpu_bench_writes_its_file_and_refuses_to_speak_without_a_gpu(tmp_path):
    out = tmp_path / "bench.json"

    def bench(*arguments: str) -> subprocess.CompletedProcess:
        return python("benchmarks/gpu_bench.py", *arguments, TRITON_INTERPRET="1")

    result = bench("--device", "cpu", "--shapes", "tiny", "--out", str(out))
    assert result.returncode == 0, result.stderr
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == 15
    assert all(max(case["errors"]) > 0 and "refused" not in case for case in cases.values())
    if not torch.cuda.is_available():
        assert "no CUDA device here; nothing was measured" in bench().stderr


# ---------------------------------------------------------------------------------------------------- choice, refusals


@pytest.fixture
def a_gpu(monkeypatch):
    """As if there were one, for what is decided before anything is launched, and no native kernels for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    monkeypatch.setattr(backends, "ENVIRONMENT", None)
    monkeypatch.setattr(backends, "_why_no_native_cuda", lambda device: "built without CUDA")
    backends._look_for_triton.cache_clear()
    yield torch.device("cuda", 0)
    backends._look_for_triton.cache_clear()


def test_cuda_tensors_go_to_triton_where_there_are_no_native_kernels(a_gpu):
    assert choose_backend(None, a_gpu) == "triton"
    assert choose_backend("triton", a_gpu, torch.bfloat16, 512) == "triton"


def test_what_triton_cannot_do_goes_to_the_next_backend_or_is_refused(a_gpu, monkeypatch):
    assert choose_backend(None, a_gpu, torch.float64) == "reference"
    assert choose_backend(None, a_gpu, torch.float32, 513) == "reference"
    with pytest.raises(ValueError, match=r"'triton' cannot run on 'cuda:0': .* compute in float32; for float64 use"):
        choose_backend("triton", a_gpu, torch.float64)
    with pytest.raises(ValueError, match="vectors of up to 512 entries, got 513; use backend='native' or"):
        choose_backend("triton", a_gpu, torch.float32, 513)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    backends._look_for_triton.cache_clear()
    assert choose_backend(None, a_gpu) == "reference"
    with pytest.raises(ValueError, match=r"need compute capability 8.0 \(Ampere\), some GPU has less"):
        choose_backend("triton", a_gpu)


@pytest.mark.parametrize(("version", "cure"), [(None, "cannot be imported"), ("3.5.1", "Triton 3.5.1 is too old")])
def test_triton_missing_or_too_old(a_gpu, monkeypatch, version, cure):
    if version is None:
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr(triton, "__version__", version)
    assert choose_backend(None, a_gpu) == "reference"
    with pytest.raises(ValueError, match=f"{cure}.*pip install 'triton>=3.6'"):
        choose_backend("triton", a_gpu)


def test_the_default_on_cpu_tensors_is_not_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "INTERPRET", True)
    monkeypatch.setattr(backends, "ENVIRONMENT", None)
    assert choose_backend(None, torch.device("cpu")) == "native"
    assert why_unavailable("triton", "cpu") is None


@pytest.mark.parametrize(("matrices", "D"), [(2, 4), (1, 600)])
def test_wide_vectors_are_known_by_what_is_summed(monkeypatch, matrices, D):
    """D_out, or D_in where one matrix is for all input capsules."""
    seen = []
    monkeypatch.setattr(backends, "why_unavailable", lambda *arguments: seen.append(arguments))
    fastcaps.dynamic_routing(torch.zeros(1, 2, 600), torch.zeros(matrices, 3, 4, 600), backend="reference")
    assert seen == [("reference", torch.device("cpu"), torch.float32, D)]
