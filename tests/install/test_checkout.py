"""Sources in a checkout that Python finds before the installed package."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.processes import python

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
# Where these tests run, the package may be installed by a finder that gives its extension to any sources.
SCRIPT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
import torch, fastcaps
from fastcaps.routing.backend import choose_backend
fastcaps.dynamic_routing(torch.randn(2, 5, 3), torch.randn(5, 4, 2, 3))
print(choose_backend(None, torch.device("cpu")))
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """(a checkout without the extension, where packages are installed, with the compiled fastcaps)."""
    checkout, site = (tmp_path_factory.mktemp(name) for name in ("checkout", "site"))
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastcaps", site / "fastcaps", ignore=left_out)
    shutil.copytree(ROOT / "fastcaps", checkout / "fastcaps", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "setup.py", checkout)
    (checkout / "csrc").mkdir()
    return checkout, site


def run_script(folder: Path, *path: Path) -> subprocess.CompletedProcess:
    """``python script.py`` in a folder, with further folders on Python's path."""
    (folder / "script.py").write_text(SCRIPT)
    result = python("script.py", cwd=folder, without=("FASTCAPS_BACKEND",), PYTHONPATH=os.pathsep.join(map(str, path)))
    assert result.returncode == 0, result.stderr
    return result


def test_uncompiled_sources_that_hide_the_installed_package_are_named(places):
    checkout, site = places
    result = run_script(checkout, site)
    assert result.stdout == "reference\n"
    assert result.stderr.count("slow reference backend") == 1
    assert (
        f"Python found the uncompiled sources in {checkout} before the installed package in {site}. Run from another "
        f"folder, or compile the sources: pip install --no-build-isolation --editable {checkout}"
    ) in result.stderr


def test_from_another_folder_the_installed_package_runs(places, tmp_path):
    result = run_script(tmp_path, places[1], places[0])
    assert result.stdout == "native\n"
    assert not result.stderr


def test_sources_alone_ask_for_a_compiler(places):
    result = run_script(places[0])
    assert result.stdout == "reference\n"
    assert "the compiled extension is missing" in result.stderr
