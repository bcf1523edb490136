"""An exported network in a program without Python."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from fastcaps import CapsNet
from fastcaps.routing.backend import why_unavailable

pytestmark = [pytest.mark.process, pytest.mark.compiler, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """aoti_capsnet.cpp, compiled."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    built = tmp_path_factory.mktemp("program") / "aoti_capsnet"
    places = [f"-I{folder}" for folder in include_paths()]
    places += [flag for folder in library_paths() for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    source = Path(__file__).parent / "aoti_capsnet.cpp"
    subprocess.run([compiler, "-std=c++20", "-O1", "-w", source, *places, *libraries, "-o", built], check=True)
    return built


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_program_without_python_runs_an_exported_network(program, tmp_path, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := why_unavailable("native", device):
        pytest.skip(reason)
    network = CapsNet((1, 12, 12), 5, stem_channels=8, kernel_size=3, types=4, capsule_dim=6)
    network = network.to(device).eval()
    images = torch.rand(3, 1, 12, 12, device=device)
    with torch.no_grad():
        expected = network(images).lengths
        exported = torch.export.export(network, (images,))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "network.pt2"))
    assert any("native_dynamic_routing_forward" in str(node.target) for node in exported.graph.nodes)
    images.cpu().numpy().tofile(tmp_path / "images.raw")
    (extension,) = (ROOT / "fastcaps").glob("_C*.so")
    command = [program, extension, package, device, *map(str, images.shape)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([*command, tmp_path / "images.raw", tmp_path / "lengths.raw"], env=environment, check=True)
    lengths = torch.from_numpy(np.fromfile(tmp_path / "lengths.raw", dtype=np.float32)).view(3, 5)
    torch.testing.assert_close(lengths, expected.cpu(), rtol=1e-4, atol=1e-5)
