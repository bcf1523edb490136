"""Every public docstring is complete and has an example that runs."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastcaps

ROOT = Path(__file__).parents[2]
MODULES = ["fastcaps", *(module.name for module in pkgutil.walk_packages(fastcaps.__path__, "fastcaps."))]
MODULES = [name for name in MODULES if name != "fastcaps._C"]


def public_objects() -> dict[str, object]:
    found = {name: getattr(fastcaps, name) for name in fastcaps.__all__}
    found |= {name: f for name, f in vars(fastcaps.losses).items() if name.endswith("_loss")}
    found |= {name: getattr(fastcaps.routing.backend, name) for name in ("why_unavailable", "choose_backend")}
    return {name: x for name, x in found.items() if inspect.isfunction(x) or inspect.isclass(x)}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    globs = {"torch": torch, **{key: getattr(fastcaps, key) for key in fastcaps.__all__}, **vars(module)}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs=globs):
        torch.manual_seed(0)
        runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize("name", public_objects())
def test_docstring_is_complete(name):
    thing = public_objects()[name]
    text = inspect.getdoc(thing) or ""
    if name in ("RoutingTrace", "CapsNetOutput"):  # what a function returns: the function has the example
        assert "Attributes:" in text
        return
    assert ">>> " in text, f"{name} has no example"
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    assert "Raises:" in text, f"{name} does not say what it raises"
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name != "self":
            assert re.search(rf"^\s+\**{parameter.name}: ", text, re.MULTILINE), (
                f"{name} does not explain {parameter.name}"
            )


def test_version_is_in_the_changelog():
    assert f"## {fastcaps.__version__}" in (ROOT / "CHANGELOG.md").read_text()
