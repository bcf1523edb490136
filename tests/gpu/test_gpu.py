"""What can only be seen on a GPU: captured graphs, streams, sizes past 2^31 elements, precision, a whole training."""

import functools
import subprocess
import sys

import pytest
import torch
from support.numerics import EVERY_KERNEL, backend_op, make_inputs, run
from torch import Tensor

import fastcaps
from fastcaps.data import Dataset, MultiMNIST
from fastcaps.data.augment import augment
from fastcaps.exactness import error_budget, relative_error
from fastcaps.measure import saved_bytes
from fastcaps.routing import dynamic_routing, route_votes
from fastcaps.routing.backend import why_unavailable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GIB = 2**30


@pytest.fixture(params=["triton", "native"])
def backend(request) -> str:
    reason = why_unavailable(request.param, "cuda")
    if reason is not None:
        pytest.skip(reason)
    return request.param


def step(backend: str, poses: Tensor, weight: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in (poses, weight)]
    out = dynamic_routing(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def paper(B: int = 128, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(B, 1152, 8, device="cuda", dtype=dtype), torch.randn(1152, 10, 16, 8, device="cuda", dtype=dtype)


def require_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * GIB:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free / GIB:.0f} are free")


@pytest.mark.parametrize(
    ("backend", "case"), [(backend, case) for backend, cases in EVERY_KERNEL.items() for case in cases],
    indirect=["backend"], ids=str,
)  # fmt: skip
def test_every_kernel(backend, case, monkeypatch):
    """Small calls of all kernels: those that `make gpu-sanitize` looks at, with memory as uninitialised as it is."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    for dtype in (torch.float32, torch.bfloat16) if backend == "native" else (torch.float32,):
        for value in run(backend_op(backend), case, make_inputs(case, dtype), dtype, "cuda").values():
            assert value.isfinite().all()


def test_bitwise_equal_repeats_beside_a_busy_stream(backend):
    poses, weight = paper()
    first = step(backend, poses, weight)
    other, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        with torch.cuda.stream(other):
            a @ a
        again = step(backend, poses, weight)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    torch.cuda.synchronize()


def test_the_current_stream_is_used(backend):
    poses, weight = paper(16)
    expected = step(backend, poses, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(poses)
        torch.cuda._sleep(20_000_000)
        late.copy_(poses)
        result = step(backend, late, weight)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(expected, result, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one(backend):
    poses, weight = paper(16)
    result = step(backend, poses.to("cuda:1"), weight.to("cuda:1"))
    assert all(torch.equal(x, y.to("cuda:0")) for x, y in zip(step(backend, poses, weight), result, strict=True))


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("sizes", [(32, 1152, 10, 8, 16), (2048, 64, 10, 8, 16), (32, 30, 10, 512, 16)], ids=str)
def test_float32_means_float32(backend, sizes, T):
    """Three products of tf32 parts against float64, output and gradients; also where sums are long: over I, B and D_in,
    as the tensor cores do not round their sums to nearest."""
    B, I, J, D_in, D_out = sizes
    poses = torch.randn(B, I, D_in, device="cuda") / D_in**0.5
    weight = torch.randn(I, J, D_out, D_in, device="cuda") / 4
    results = {}
    for name, dtype in ((backend, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (poses, weight)]
        out = dynamic_routing(*leaves, num_iterations=T, backend=name)
        results[name, dtype] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    exact = results["reference", torch.float64]
    for n, (ours, reference) in enumerate(
        zip(results[backend, torch.float32], results["reference", torch.float32], strict=True)
    ):
        budget = error_budget(torch.float32, relative_error(reference, exact[n]), gradient=n > 0)
        assert relative_error(ours, exact[n]) <= budget


def test_tf32_is_used_where_pytorch_allows_it_and_nowhere_else(backend):
    poses, weight = paper(32)
    exact = dynamic_routing(poses.double(), weight.double(), backend="reference")
    strict = relative_error(dynamic_routing(poses, weight, backend=backend), exact)
    torch.set_float32_matmul_precision("high")
    try:
        loose = relative_error(dynamic_routing(poses, weight, backend=backend), exact)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert strict < 1e-5 < loose < 5e-2


def test_nan_reaches_bfloat16_gradients(backend):
    """A NaN of the GPU has all bits set: rounding by bits must not make a number of it."""
    poses, weight = torch.randn(4, 5, 3, device="cuda").bfloat16(), torch.randn(5, 4, 6, 3, device="cuda").bfloat16()
    poses[1] = float("nan")
    _, d_poses, d_weight = step(backend, poses, weight)
    assert d_poses[1].isnan().all()
    assert d_poses[[0, 2, 3]].isfinite().all()
    assert d_weight.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(backend, dtype):
    """What is saved, and the peak of a training step beside inputs, output and gradients."""
    poses, weight = (x.requires_grad_() for x in paper(128, dtype))
    assert saved_bytes(lambda x, w: dynamic_routing(x, w, backend=backend), poses, weight) == 4 * 3 * 128 * 10 * 16
    step(backend, poses, weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(backend, poses, weight)
    own = sum(x.numel() * x.element_size() for x in results)
    # Partial sums of about a thousand warps, 10 MB, and a float32 gradient of the weight: the votes would take 94 MB.
    assert torch.cuda.max_memory_allocated() - before - own < 24e6


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_poses_and_votes_past_two_to_the_31(backend):
    """The last rows of tensors with more than 2^31 elements, against the same rows alone."""
    require_memory(30)
    B, I, D = 2_100_000, 64, 16  # 2.15e9 elements, 4.3 GB in bfloat16
    poses = torch.randn(64, I, D, device="cuda", dtype=torch.bfloat16).repeat(B // 64 + 1, 1, 1)[:B]
    weight = torch.randn(I, 3, 8, D, device="cuda", dtype=torch.bfloat16)
    out = dynamic_routing(poses, weight, num_iterations=2, backend=backend)
    torch.testing.assert_close(out[-64:], dynamic_routing(poses[-64:], weight, num_iterations=2, backend=backend))
    votes = poses.view(B, 16, 4, 16)
    leaf = votes.detach().requires_grad_()
    out = route_votes(leaf, num_iterations=2, backend=backend)
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    last = votes[-64:].detach().requires_grad_()
    few = route_votes(last, num_iterations=2, backend=backend)
    torch.testing.assert_close(out[-64:], few)
    torch.testing.assert_close(gradient[-64:], torch.autograd.grad(few, last, torch.ones_like(few))[0])


def test_weight_past_two_to_the_31(backend):
    require_memory(40)
    I, J = 1_050_000, 16  # times 16 x 8: 2.15e9 elements
    weight = torch.randn(1000, J, 16, 8, device="cuda", dtype=torch.bfloat16).repeat(I // 1000, 1, 1, 1)
    poses = torch.randn(2, I, 8, device="cuda", dtype=torch.bfloat16)
    poses[:, :-1000] = 0  # only the last thousand vote
    leaf = weight.requires_grad_()
    out = dynamic_routing(poses, leaf, num_iterations=1, backend=backend)
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    last = weight[-1000:].detach()
    # One iteration: the coupling is 1 / J for all, so the others add nothing to the sums.
    expected = dynamic_routing(poses[:, -1000:].contiguous(), last, num_iterations=1, backend=backend)
    torch.testing.assert_close(out, expected)
    assert (gradient[:-1000] == 0).all()
    assert gradient[-1000:].abs().max() > 0


# --------------------------------------------------------------------------------------------------------------- graphs


def test_capture_and_replay(backend):
    """After warmup alone: no training step of these sizes has run before the capture."""
    sizes = (48, 300, 7, 8, 12)  # of no other test
    poses, weight = torch.randn(48, 300, 8, device="cuda"), torch.randn(300, 7, 12, 8, device="cuda")
    fastcaps.warmup(sizes, backend=backend)
    step(backend, *paper(16))  # what PyTorch itself loads on first use
    graph, still = torch.cuda.CUDAGraph(), torch.randn_like(poses)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = step(backend, still, weight)
    still.copy_(poses)
    expected = step(backend, poses, weight)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(expected, result, strict=True))


def test_capture_without_warmup_names_warmup(backend):
    """In a process of its own, as a failed capture may leave its process unable to go on."""
    code = """
import sys, traceback, torch, fastcaps
x, w = torch.randn(3, 7, 5, device="cuda"), torch.randn(7, 3, 6, 5, device="cuda")
torch.cuda.synchronize()
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        fastcaps.dynamic_routing(x, w, backend=sys.argv[1])
    print("captured")
except RuntimeError:
    print(traceback.format_exc())  # leaving the capture may raise an error of its own
"""
    result = subprocess.run([sys.executable, "-c", code, backend], capture_output=True, text=True, check=False)
    assert "fastcaps.warmup" in result.stdout or "captured" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compile_with_graphs(backend, mode):
    poses, weight = paper(16)
    compiled = torch.compile(lambda x, w: dynamic_routing(x, w, backend=backend).square(), mode=mode, fullgraph=True)
    leaves = [x.detach().requires_grad_() for x in (poses, weight)]
    expected = step(backend, poses, weight)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*leaves)
        gradients = torch.autograd.grad(out.sum(), leaves)
        torch.testing.assert_close(out, expected[0].square())
        for ours, theirs in zip(gradients, expected[1:], strict=True):
            torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------------------------- training


def test_training_overlays_the_reference(backend):
    """500 steps of a small network: the losses of both backends stay together."""
    losses = {}
    for name in (backend, "reference"):
        torch.manual_seed(0)
        data = torch.randn(64, 20, 8, device="cuda")
        labels = torch.randint(0, 5, (64,), device="cuda")
        routing = functools.partial(dynamic_routing, backend=name)
        layer = fastcaps.CapsuleLayer(20, 8, 5, 16, routing=routing, device="cuda")
        optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
        found = []
        for _ in range(500):
            loss = fastcaps.losses.margin_loss(layer(data).norm(dim=-1), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses[name] = torch.stack(found)
    ours, reference = losses[backend], losses["reference"]
    assert reference[-1] < 0.2 * reference[0]
    assert ((ours - reference).abs() <= 1e-3 * reference[0]).all()


@pytest.mark.parametrize("options", [(), ("--precision", "bf16-mixed", "--compile")], ids=" ".join)
def test_a_training_run(backend, options, tmp_path, monkeypatch):
    """`fastcaps train`, made longer by --resume, with its report, and `fastcaps evaluate`."""
    pytest.importorskip("lightning")
    from fastcaps import cli
    from fastcaps.train.report import read_log

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)
    small = ["--stem", "32", "--types", "4", "--backend", backend, *options]
    for more in (["--epochs", "1"], ["--epochs", "6", "--resume"]):
        assert cli.main(["train", "--out", str(tmp_path / "run"), *small, *more]) == 0
    errors = [row["test_error"] for row in read_log(tmp_path / "run") if "test_error" in row]
    assert len(errors) == 6
    assert errors[-1] < 20
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000
    assert cli.main(["evaluate", str(tmp_path / "run" / "model.safetensors")]) == 0


def test_samples_are_the_same_on_every_device():
    images, labels, index = torch.rand(50, 1, 28, 28), torch.arange(50) % 10, torch.arange(50)
    shifted = [augment(images.to(d), index.to(d), seed=1, epoch=2).cpu() for d in ("cpu", "cuda")]
    assert torch.equal(*shifted)
    pairs = []
    for device in ("cpu", "cuda"):
        digits = Dataset(*(x.to(device) for x in (images, labels, images, labels)), 10)
        pairs.append(MultiMNIST(digits).batch(index.to(device), seed=1, epoch=2))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*pairs, strict=True))
