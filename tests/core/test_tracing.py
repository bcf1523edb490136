"""What torch.jit.trace and the exporters to ONNX make of a layer; torch.compile is in test_contracts.py."""

import math
import warnings
from typing import Any

import pytest
import torch
from support.numerics import small_inputs
from torch import Tensor, nn

from fastcaps import CapsNet, CapsuleLayer
from fastcaps.routing import dynamic_routing


@pytest.fixture
def quiet():
    """Without the warnings of the tracers: of the checks of shapes, and that they are old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_recorded_trace_has_its_gradients(implementation, wide, tmp_path, quiet):
    backend, device = implementation
    inputs = small_inputs(device, wide)
    prior, leaves = inputs["prior"].detach(), [inputs["poses"], inputs["weight"]]

    def op(poses: Tensor, weight: Tensor) -> Tensor:
        return dynamic_routing(poses, weight, prior=prior, backend=backend)

    traced = torch.jit.trace(op, leaves)
    path = str(tmp_path / "op.pt")
    torch.jit.save(traced, path)
    expected = op(*leaves)
    gradients = torch.autograd.grad(expected.sin().sum(), leaves)
    for function in (traced, torch.jit.load(path)):
        out = function(*leaves)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), leaves), gradients)


class Layer(nn.Module):
    """All options of a call as inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CapsuleLayer(12, 4, 3, 8, bias=True, learn_prior=True)

    def forward(self, poses: Tensor, mask: Tensor, prior: Tensor) -> Tensor:
        return self.layer(poses, mask=mask, prior=prior)


def arguments(B: int) -> dict[str, Tensor]:
    mask = torch.rand(B, 12) < 0.7
    prior = torch.randn(B, 12, 3).masked_fill(~mask[..., None], math.nan)
    prior[0, 0] = -math.inf
    return {"poses": torch.randn(B, 12, 4), "mask": mask, "prior": prior}


EXPORTERS = pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.compiler)])


def onnx_session(model: nn.Module, inputs: dict[str, Tensor], path: str, dynamo: bool) -> Any:
    """What onnxruntime makes of a model that is exported with a batch of any size, by one of both exporters."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="for the export to ONNX")
    runtime = pytest.importorskip("onnxruntime", reason="for the export to ONNX")
    batch = {name: {0: "B"} for name in inputs}
    options = {"dynamic_shapes": batch, "verbose": False} if dynamo else {"dynamic_axes": batch}
    torch.onnx.export(model, tuple(inputs.values()), path, dynamo=dynamo, input_names=list(inputs), **options)
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


@EXPORTERS
def test_onnx_of_a_layer(dynamo, tmp_path, quiet):
    layer = Layer().eval()
    nn.init.normal_(layer.layer.prior)
    session = onnx_session(layer, arguments(5), str(tmp_path / "layer.onnx"), dynamo)
    for B in (5, 7):
        inputs = arguments(B)
        (out,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(out), layer(**inputs).detach())


@EXPORTERS
def test_onnx_of_a_network(dynamo, tmp_path, quiet):
    network = CapsNet((1, 12, 12), 5, stem_channels=8, kernel_size=3, types=4).eval()
    session = onnx_session(network, {"images": torch.rand(3, 1, 12, 12)}, str(tmp_path / "network.onnx"), dynamo)
    images = torch.rand(7, 1, 12, 12)
    with torch.no_grad():
        output = network(images)
    for result, expected in zip(session.run(None, {"images": images.numpy()}), output, strict=True):
        torch.testing.assert_close(torch.from_numpy(result), expected)


def test_export_keeps_the_op_through_decompositions():
    layer, poses = CapsuleLayer(12, 4, 3, 8).eval(), torch.randn(5, 12, 4)
    exported = torch.export.export(layer, (poses,)).run_decompositions()
    assert any("native_dynamic_routing_forward" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(poses), layer(poses))
