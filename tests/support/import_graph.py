"""Which module of fastcaps imports which, read from the sources: ``python tests/support/import_graph.py [CHECKOUT]``.

An arrow is one module that imports another, wherever in the file; a circle is a set of modules that reach each other
by the imports that run when they are imported. A room is a wing, its parts taken together, or a module outside.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Dotted names and files; a package is its ``__init__``."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path, known: dict[str, Path], on_import: bool) -> Iterator[str]:
    """The modules that a file imports; with ``on_import`` without what functions and type checkers import."""
    pending: list[ast.AST] = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if on_import and (isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and _for_types(node))):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield from (place for place in (inner if inner in known else node.module,) if place in known)


def _for_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def graph(package: Path, on_import: bool = False) -> Graph:
    """From each module to those that it imports."""
    known = modules(package)
    return {name: set(imported(file, known, on_import)) - {name} for name, file in known.items()}


def rooms(arrows: Graph) -> Graph:
    """The same between wings: ``fastcaps.train.run`` counts as ``fastcaps.train``."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    found: Graph = {room(name): set() for name in arrows}
    for name, targets in arrows.items():
        found[room(name)] |= {room(target) for target in targets} - {room(name)}
    return found


def circles(arrows: Graph) -> list[set[str]]:
    """Sets of modules that reach each other."""
    reach = {name: set(targets) for name, targets in arrows.items()}
    for middle in arrows:
        for name in arrows:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    mutual = {frozenset({name} | {t for t in reach[name] if name in reach[t]}) for name in arrows}
    return [set(group) for group in mutual if len(group) > 1]


def floors(arrows: Graph) -> int:
    """The length of the longest way down; the modules of a circle count as one."""
    groups = {name: next((frozenset(c) for c in circles(arrows) if name in c), frozenset({name})) for name in arrows}
    below = {group: {groups[t] for name in group for t in arrows[name]} - {group} for group in set(groups.values())}

    def height(group: frozenset[str]) -> int:
        return 1 + max((height(other) for other in below[group]), default=0)

    return max(map(height, below))


def report(checkout: Path) -> str:
    """The numbers of a checkout."""
    package = checkout / "fastcaps"
    flat = [name for name in package.glob("*.py") if not name.name.startswith("_")]
    lines = [f"flat modules {len(flat)}"]
    for what, arrows in (("modules", graph(package)), ("rooms", rooms(graph(package)))):
        count = sum(map(len, arrows.values()))
        lines.append(f"{what} {len(arrows)}, arrows {count}, floors {floors(arrows)}, circles {circles(arrows)}")
    on_import = circles(graph(package, on_import=True))
    sizes = {name: len(file.read_text().splitlines()) for name, file in modules(package).items()}
    longest = max(sizes, key=lambda name: sizes[name])
    return "\n".join([*lines, f"circles at import {on_import}", f"longest {longest} with {sizes[longest]} lines"])


if __name__ == "__main__":
    print(report(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
