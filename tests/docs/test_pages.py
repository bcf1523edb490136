"""README and documentation: code runs, commands parse, links lead somewhere, lists are whole."""

import argparse
import importlib.util
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from peers import seed

import fastcaps
from fastcaps import cli
from fastcaps.convert import RECIPES
from fastcaps.doctor import examine

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [path.relative_to(ROOT).as_posix() for path in PAGES]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The words of every ``fastcaps`` command in a page's shell blocks."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))[:1] == ["fastcaps"]]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


TRAINS = "docs/tutorial.md"


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.train if p == TRAINS else ()) for p in PAGES if blocks(p, "python")],
)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*works until fastcaps")  # no old names in the documentation
        for n, block in enumerate(blocks(page, "python")):
            exec(compile(block, f"{page}, block {n}", "exec"), names)


class Parsed(Exception):
    """Raised instead of running a command."""


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_parse(page, monkeypatch):
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(parser, *args, **kwargs):
        found = parse(parser, *args, **kwargs)
        if parser.prog == "fastcaps":
            raise Parsed(found[1])
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    for words in commands(page):
        with pytest.raises(Parsed) as parsed:
            cli.main(words[1:])
        assert parsed.value.args == ([],), f"{shlex.join(words)}: unknown options"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        assert "://" not in target, f"{target}: a link to another host cannot be checked offline"
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), f"{page} links to {target}, which is not there"
        assert not anchor or anchor in anchors(there), f"{page} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", PAGES[:2] + [page for page in PAGES if page.startswith("docs/")])
def test_source_files_that_are_named_exist(page):
    folders = ("fastcaps", "csrc", "tests", "benchmarks", "docs")
    there = [path for folder in folders for path in (ROOT / folder).rglob("*.*")] + list(ROOT.glob("*.py"))
    for name in re.findall(r"`([\w/.]+\.(?:py|h|cpp|cu))`", text_of(page)):
        assert any(path.as_posix().endswith(f"/{name}") for path in there), f"{page} names {name}, which is not there"


def test_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 150


def test_every_environment_variable_is_documented():
    sources = [ROOT / "setup.py", *(ROOT / "fastcaps").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]
    read = re.compile(r"""(?:environ(?:\.get\(|\.setdefault\(|\[)|getenv\()["']([A-Z][A-Z_]+)["']""")
    names = {name for path in sources for name in read.findall(path.read_text())}
    assert {"FASTCAPS_BACKEND", "FASTCAPS_CUDA", "ATEN_CPU_CAPABILITY"} <= names
    assert not {name for name in names if f"`{name}`" not in text_of("docs/install.md")}


def test_every_check_of_the_doctor_is_explained():
    explained = set(re.findall(r"^### (.+)$", text_of("docs/doctor.md"), re.MULTILINE))
    layer_of_others = seed.Network(size=12, kernel=3, stem=5, types=3, dim=4, classes=10, out_dim=6)
    ours = fastcaps.CapsNet((1, 12, 12), 10, stem_channels=5, kernel_size=3, types=3)
    found = [finding for model in (layer_of_others, ours) for finding in examine(model, torch.rand(7, 1, 12, 12))]
    found += examine(torch.nn.Linear(3, 2), torch.rand(7, 4))  # it does not run
    assert {finding.check for finding in found} == explained


def test_every_recipe_is_listed():
    assert not {recipe.name for recipe in RECIPES if f"`{recipe.name}`" not in text_of("docs/convert.md")}


def test_settings_table_is_current():
    spec = importlib.util.spec_from_file_location("settings_table", ROOT / "docs" / "settings_table.py")
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    assert table.PAGE.read_text() == table.current(), "run python docs/settings_table.py"
