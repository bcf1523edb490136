"""What dynamic_routing and route_votes keep to beside their numbers, on every backend and device."""

import sys
import threading
from collections.abc import Callable

import pytest
import torch
from support.numerics import Case, backend_op, make_inputs, run, small_inputs
from support.processes import python
from torch import Tensor

from fastcaps.exactness import error_budget, relative_error
from fastcaps.measure import saved_bytes
from fastcaps.routing import dynamic_routing, route_votes
from fastcaps.routing.dynamic.ops import op as compiled_op
from fastcaps.routing.dynamic.ops import run_op


@pytest.mark.parametrize("threads", [1, 2, 7, 8])
@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        ((2, 200, 7, 8, 12), "none"),
        ((19, 200, 7, 8, 12), "none"),
        ((2, 200, 7, 8, 12), "inputs"),
        ((19, 200, 7, 8, 12), "inputs"),
        ((19, 5, 7, 131, 12), "none"),
        ((131, 37, 3, 101, 5), "none"),
    ],
    ids=str,
)
def test_bitwise_equal_repeats(implementation, threads, sizes, share):
    backend, device = implementation
    case = Case(sizes=sizes, share=share, prior="IJ", bias="J")
    inputs = make_inputs(case, torch.float32)
    before = torch.get_num_threads()
    first = run(backend_op(backend), case, inputs, torch.float32, device)
    try:
        # The reference is a BLAS's, which may sum in another order with another number of threads.
        torch.set_num_threads(before if backend == "reference" else threads)
        again = run(backend_op(backend), case, inputs, torch.float32, device)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_sample_does_not_depend_on_its_batch(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide)
    out = dynamic_routing(**inputs, backend=backend)
    for b in range(3):
        alone = dynamic_routing(
            inputs["poses"][b : b + 1],
            inputs["weight"],
            prior=inputs["prior"][b : b + 1],
            bias=inputs["bias"],
            backend=backend,
        )
        torch.testing.assert_close(out[b : b + 1], alone)


@pytest.mark.parametrize(
    "frozen", [["weight", "prior", "bias"], ["poses"], ["poses", "weight"], ["poses", "bias"]], ids=str
)
def test_frozen_inputs(implementation, wide, frozen):
    backend, device = implementation
    full, part = small_inputs(device, wide, grad=False), {}
    full = {name: x.requires_grad_() for name, x in full.items()}
    part = {name: x.detach().clone().requires_grad_(name not in frozen) for name, x in full.items()}
    dynamic_routing(**full, backend=backend).sum().backward()
    dynamic_routing(**part, backend=backend).sum().backward()
    for name in full:
        if name in frozen:
            assert part[name].grad is None
        else:
            assert torch.equal(part[name].grad, full[name].grad)


def test_retain_graph(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide)
    out = dynamic_routing(**inputs, backend=backend).sum()
    first = torch.autograd.grad(out, list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(out, list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_activation_checkpointing(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide)

    def op(poses: Tensor) -> Tensor:
        return dynamic_routing(poses, inputs["weight"], backend=backend)

    expected = torch.autograd.grad(op(inputs["poses"]).sum(), inputs["poses"])
    out = torch.utils.checkpoint.checkpoint(op, inputs["poses"], use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.sum(), inputs["poses"])[0], expected[0])


def test_inference_mode_saves_nothing(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide)
    with torch.inference_mode():
        out = dynamic_routing(**inputs, backend=backend)
    assert out.is_inference()
    with torch.no_grad():
        assert dynamic_routing(**inputs, backend=backend).grad_fn is None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), torch.no_grad():
        dynamic_routing(**inputs, backend=backend)
    assert not saved


def test_editing_a_saved_input_raises(implementation, wide):
    backend, device = implementation
    for name in ("poses", "weight"):
        inputs = small_inputs(device, wide)
        inner = {n: x * 1.0 for n, x in inputs.items()}
        out = dynamic_routing(**inner, backend=backend)
        with torch.no_grad():
            inner[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_threads(implementation, wide):
    backend, device = implementation
    inputs = small_inputs(device, wide, grad=False)
    expected = dynamic_routing(**inputs, backend=backend)
    results: list[Tensor] = []

    def work() -> None:
        for _ in range(20):
            x = {name: value.clone().requires_grad_() for name, value in inputs.items()}
            out = dynamic_routing(**x, backend=backend)
            out.sum().backward()
            results.append(out.detach())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(implementation, wide, dtype):
    backend, device = implementation
    inputs = small_inputs(device, torch.float32)
    with torch.autocast(device, dtype):
        out = dynamic_routing(**inputs, backend=backend)
        votes = route_votes(torch.randn(2, 5, 3, 4, device=device), backend=backend)
    out.float().sum().backward()
    assert out.dtype == votes.dtype == dtype
    assert inputs["poses"].grad.dtype == torch.float32
    # Poses and weight are rounded, the prior and the bias are not, and nothing inside is.
    rounded = {n: x.detach().to(dtype).float() if n in ("poses", "weight") else x.detach() for n, x in inputs.items()}
    expected = dynamic_routing(**rounded, backend=backend).to(dtype)
    assert torch.equal(out, expected)
    if wide == torch.float64:
        double = small_inputs(device, wide, grad=False)
        with torch.autocast(device, dtype):
            assert dynamic_routing(**double, backend=backend).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------- compile


def _compare_compiled(compiled, backend: str, device: str, B: int, dtype: torch.dtype) -> None:
    torch.manual_seed(B)
    like = {"dtype": dtype, "device": device}
    leaves = small_inputs(device, dtype, grad=False)
    leaves |= {"poses": torch.randn(B, 5, 3, **like), "prior": torch.randn(B, 5, 4, **like)}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    mask = torch.rand(B, 5, device=device) < 0.8
    results = []
    for op in (compiled, backend_op(backend)):
        out = op(**leaves, mask=mask, num_iterations=2, leaky=True, eps=1e-8)  # each is traced on its own
        grads = torch.autograd.grad(out.sin().sum(), list(leaves.values()))
        results.append([out.detach(), *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.compiler
def test_compile(implementation, wide, compiler):
    backend, device = implementation
    compiled = torch.compile(backend_op(backend), fullgraph=True, backend=compiler, dynamic=False)
    _compare_compiled(compiled, backend, device, 3, wide)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.compiler
def test_compile_with_a_dynamic_batch_compiles_once(implementation, wide, compiler):
    backend, device = implementation
    compiled = torch.compile(backend_op(backend), fullgraph=True, backend=compiler, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B in (11, 13, 17):  # no size of another axis, or Dynamo takes the two for one
            _compare_compiled(compiled, backend, device, B, wide)


@pytest.mark.compiler
def test_compile_route_votes(implementation):
    backend, device = implementation
    compiled = torch.compile(route_votes, fullgraph=True, backend="aot_eager")
    votes = torch.randn(3, 5, 4, 2, device=device, requires_grad=True)
    out = compiled(votes, backend=backend, detach=True)
    expected = route_votes(votes, backend=backend, detach=True)
    torch.testing.assert_close(out, expected)
    for a, b in zip(torch.autograd.grad(out.sum(), votes), torch.autograd.grad(expected.sum(), votes), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.compiler
def test_compile_under_autocast(implementation):
    backend, device = implementation
    inputs = small_inputs(device, torch.float32, grad=False)

    def op(**x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return dynamic_routing(**x, backend=backend)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), op(**inputs))


@pytest.mark.compiler
def test_second_derivatives_are_not_lost_in_compilation(implementation, wide):
    """A gradient penalty in a compiled function: by torch.func, and by autograd where Dynamo can trace it."""
    backend, device = implementation
    inputs = small_inputs(device, wide)
    poses, weight = inputs["poses"], inputs["weight"]

    def gradient(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def penalty(poses: Tensor, weight: Tensor) -> Tensor:
            def energy(poses: Tensor) -> Tensor:
                return dynamic_routing(poses, weight, num_iterations=2, backend=backend).square().sum()

            return torch.func.grad(energy)(poses).square().sum()

        return torch.func.grad(penalty, argnums=(0, 1))

    compiled = torch.compile(gradient(backend), fullgraph=True, backend="aot_eager")
    exact, rounded = (
        gradient("reference")(*(x.detach().cpu().to(dtype) for x in (poses, weight)))
        for dtype in (torch.float64, torch.float32)
    )
    scale = torch.finfo(wide).eps / torch.finfo(torch.float32).eps
    for function in (compiled, gradient(backend)):
        for n, ours in enumerate(function(poses.detach(), weight.detach())):
            budget = error_budget(wide, scale * relative_error(rounded[n], exact[n]), gradient=True)
            assert relative_error(ours.cpu(), exact[n]) <= budget
            assert exact[n].abs().max() > 0

    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return

    def loss(poses: Tensor, weight: Tensor) -> Tensor:
        out = dynamic_routing(poses, weight, num_iterations=2, backend=backend)
        (g,) = torch.autograd.grad(out.square().sum(), poses, create_graph=True)
        return out.sum() + g.square().sum()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(poses, weight)
    for ours, expected in zip(
        torch.autograd.grad(value, [poses, weight]),
        torch.autograd.grad(loss(poses, weight), [poses, weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


# --------------------------------------------------------------------------------------------------------------- op


@pytest.mark.runs_interpreted(unless=lambda given: given in ("weight", "votes"))
@pytest.mark.parametrize("given", ["weight", "votes", "prior, bias and mask"])
def test_opcheck(implementation, wide, given):
    backend, device = implementation
    if backend == "reference":
        pytest.skip("the reference is no op")
    x = small_inputs(device, wide, grad=False)
    poses, weight, prior, bias = x["poses"], x["weight"], None, None
    mask = None
    if given == "votes":
        poses, weight = torch.randn(3, 5, 4, 2, dtype=wide, device=device), None
    if given == "prior, bias and mask":
        prior, bias, mask = x["prior"], x["bias"], torch.rand(3, 5, device=device) < 0.5
    forward = (poses, weight, prior, bias, mask, 3, False, False, 0.0)
    torch.library.opcheck(compiled_op(backend, "forward"), forward)
    out, sums = compiled_op(backend, "forward")(*forward)
    every, some, others = [True] * 4, [True, False, False, True], [False, True, True, False]
    for needed in {"weight": (every, some), "votes": (every, others)}.get(given, (every, some, others)):
        backward = (out, poses, weight, prior, bias, mask, sums, False, False, 0.0, *needed)
        torch.library.opcheck(compiled_op(backend, "backward"), backward)


def test_op_refuses_wrong_sizes_instead_of_reading_past_a_tensor():
    x = small_inputs(grad=False)
    op = torch.ops.fastcaps.native_dynamic_routing_forward
    bad = [
        (x["poses"], x["weight"][:3], None, None, None),
        (x["poses"], x["weight"][..., :2], None, None, None),
        (x["poses"], x["weight"].float(), None, None, None),
        (x["poses"], x["weight"][:, :2], x["prior"], None, None),
        (x["poses"], x["weight"], x["prior"][:2], None, None),
        (x["poses"], x["weight"], None, x["bias"][:, :1], None),
        (x["poses"], x["weight"], None, None, torch.ones(3, 4, dtype=torch.bool)),
        (x["poses"], x["weight"], None, None, torch.ones(3, 5)),
        (x["poses"], None, None, None, None),
        (x["poses"].half(), x["weight"].half(), x["prior"].half(), None, None),
        (x["poses"].int(), x["weight"].int(), None, None, None),
    ]
    for arguments in bad:
        with pytest.raises(RuntimeError, match="native_dynamic_routing: "):
            op(*arguments, 3, False, False, 0.0)
    out, sums = op(x["poses"], x["weight"], x["prior"], x["bias"], None, 3, False, False, 0.0)
    backward = torch.ops.fastcaps.native_dynamic_routing_backward
    for grad, saved in ((out[:2], sums), (out, sums[:, :2]), (out[..., :1], sums), (out.float(), sums)):
        with pytest.raises(RuntimeError, match="native_dynamic_routing: "):
            backward(grad, *x.values(), None, saved, False, False, 0.0, True, True, True, True)
    with pytest.raises(RuntimeError, match="num_iterations"):
        op(x["poses"], x["weight"], None, None, None, 0, False, False, 0.0)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_only_the_inputs_and_the_sums_are_saved(dtype):
    """The memory contract between forward and backward: T x B x J x D_out numbers beside the inputs, and no votes."""
    B, I, J, D_in, D_out, T = 16, 200, 10, 8, 16, 3
    poses = torch.randn(B, I, D_in, dtype=dtype, requires_grad=True)
    weight = torch.randn(I, J, D_out, D_in, dtype=dtype, requires_grad=True)
    saved = {
        backend: saved_bytes(lambda x, w, b=backend: dynamic_routing(x, w, num_iterations=T, backend=b), poses, weight)
        for backend in ("native", "reference")
    }
    size = max(4, dtype.itemsize)  # sums of half types are float32
    assert saved["native"] == size * T * B * J * D_out
    assert saved["reference"] > size * B * I * J * D_out  # the votes: the measure sees what it should


@pytest.mark.parametrize("what", ["result", "copy"])
def test_memory_that_is_not_there_is_pytorchs_own_error(implementation, what):
    """2^50 bytes, more than any address space has: for the result, or for a copy of what is not contiguous."""
    backend, device = implementation
    kind = torch.OutOfMemoryError if device == "cuda" else RuntimeError
    poses = torch.zeros(2**24 if what == "result" else 1, 1, 1, device=device)
    weight = torch.zeros(1, 2**12, 2**12, 1, device=device)
    if what == "copy":
        weight = weight[:, :1, :1].expand(1, 2**24, 2**24, 1)
    text = r"can't allocate memory: you tried to allocate|CUDA out of memory\. Tried to allocate"
    with pytest.raises(kind, match=text) as raised:
        dynamic_routing(poses, weight, num_iterations=1, backend=backend)
    assert type(raised.value) is kind


def test_an_error_after_missing_memory_is_its_own():
    poses, weight = torch.zeros(2**24, 1, 1), torch.zeros(1, 2**12, 2**12, 1)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        dynamic_routing(poses, weight, num_iterations=1, backend="native")
    with pytest.raises(RuntimeError, match="weight does not fit poses"):
        run_op("native", "forward", poses, weight[..., :0], None, None, None, 1, False, False, 0.0)


# The gradient of the weight takes 66 MB, and scratch memory for 4096 samples 105 MB. Of the long layer two gradients
# take 64 MB each: the first is there and given back when the second is not, so that 64 MB alone would be found again.
LITTLE_MEMORY = """
import resource, torch, fastcaps

def leave(megabytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, resource.RLIM_INFINITY))

poses, weight = torch.randn(1, 64, 8), torch.randn(64, 1000, 32, 8, requires_grad=True)
fastcaps.dynamic_routing(poses, weight).sum().backward()
weight.grad = None
loss = fastcaps.dynamic_routing(poses, weight).sum()
long = torch.ones(1, 2**19, 32, requires_grad=True), torch.ones(2**19, 1, 1, 32, requires_grad=True)
long_loss = fastcaps.dynamic_routing(*long).sum()
many = torch.randn(4096, 8, 4), torch.randn(8, 200, 32, 4)
for megabytes, call in ((20, loss.backward), (100, long_loss.backward), (430, lambda: fastcaps.dynamic_routing(*many))):
    leave(megabytes)
    try:
        call()
    except RuntimeError as error:
        print("can't allocate memory: you tried to allocate" in str(error))
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_memory_that_gradients_or_scratch_do_not_get():
    ran = python("-c", LITTLE_MEMORY)
    assert ran.stdout.split() == ["True"] * 3, ran.stdout + ran.stderr
