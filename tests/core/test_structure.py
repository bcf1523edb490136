"""The shape of the package: wings, no circles, nothing heavy on import."""

from pathlib import Path

from support.import_graph import circles, graph, modules, rooms

PACKAGE = Path(__file__).parents[2] / "fastcaps"

# A new module goes into a wing. Whoever adds one here says why in the commit.
FLAT = {
    "__init__", "__main__", "_atomic", "_axes", "_checks", "_deprecated", "_reading", "_version", "benchmarking", "cli",
    "demo", "exactness", "functional", "layers", "losses", "measure", "preload",
}  # fmt: skip


def test_a_new_module_goes_into_a_wing():
    assert {file.stem for file in PACKAGE.glob("*.py")} == FLAT


def test_no_module_imports_itself_by_way_of_others():
    assert circles(graph(PACKAGE)) == []


def test_no_wing_imports_itself_by_way_of_others():
    assert circles(rooms(graph(PACKAGE))) == []


def test_a_circle_is_seen():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(arrows) == [{"a", "b", "c"}]
    assert rooms({"x.a.b": {"x.a.c", "x.d"}, "x.a.c": set(), "x.d": set()}) == {"x.a": {"x.d"}, "x.d": set()}


def test_modules_are_short_enough_to_be_read():
    lines = {name: len(file.read_text().splitlines()) for name, file in modules(PACKAGE).items()}
    assert {name: count for name, count in lines.items() if count > 420} == {}
