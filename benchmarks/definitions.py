"""The classes and functions of other people's files, without the rest: a script trains or downloads when imported.

Of a file only imports, definitions and plain assignments are run. What an import cannot find is :class:`Missing`.
"""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

CALLS = {"torch.device", "torch.cuda.is_available", "int", "float", "range"}  # what an assignment may call


class Missing:
    """Stands for what could not be imported: it can be called, subclassed, and asked for any attribute."""

    def __call__(self, *args: Any, **kwargs: Any) -> "Missing":
        """Another one."""
        return Missing()

    def __getattr__(self, name: str) -> "Missing":
        if name.startswith("__"):  # Python itself asks for these
            raise AttributeError(name)
        return Missing()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()


def load(folders: Sequence[Path], name: str, given: Mapping[str, Mapping[str, Any]] | None = None) -> ModuleType:
    """A module with the definitions of a file.

    Args:
        folders: where it and the modules that it imports are looked for, before the installed ones.
        name: of the module, as it would be imported; a notebook is a module, too.
        given: names that are there before a file is run, by module: options from a command line, say.

    Raises:
        ModuleNotFoundError: there is no such file.
    """
    sys.meta_path.insert(0, _Finder(folders, given or {}))
    return importlib.import_module(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules in some folders, and runs their definitions."""

    def __init__(self, folders: Sequence[Path], given: Mapping[str, Mapping[str, Any]]) -> None:
        self.folders, self.given = folders, given

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Where a module is; a folder is a package, with or without ``__init__.py``."""
        name = fullname.rpartition(".")[2]
        for folder in self.folders if path is None else map(Path, path):
            if not any(folder.is_relative_to(root) for root in self.folders):
                continue
            package = folder / name
            for file in (package / "__init__.py", package.with_name(f"{name}.py"), package.with_name(f"{name}.ipynb")):
                if file.is_file():
                    inner = [str(package)] if file.parent == package else None
                    return importlib.util.spec_from_file_location(
                        fullname, file, loader=self, submodule_search_locations=inner
                    )
            if package.is_dir():
                spec = importlib.machinery.ModuleSpec(fullname, self, is_package=True)
                spec.submodule_search_locations = [str(package)]
                return spec
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Run the definitions of a file."""
        names = vars(module)
        names.update(self.given.get(module.__name__, {}))
        file = getattr(module, "__file__", None)
        if file is None:  # a folder
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for node in _definitions(Path(file)):
                code = compile(ast.Module([node], []), file, "exec")
                try:
                    exec(code, names)
                except Exception:  # what needs something that is not there is not there either
                    if isinstance(node, (ast.Import, ast.ImportFrom)):
                        names.update({alias.asname or alias.name.split(".")[0]: Missing() for alias in node.names})


def _definitions(file: Path) -> Iterator[ast.stmt]:
    """The statements of a file that are run."""
    for cell in _cells(file):
        try:
            tree = ast.parse(cell)
        except SyntaxError:  # a notebook's cell in another language, or in Python 2
            continue
        yield from filter(_is_definition, tree.body)


def _cells(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        yield text
        return
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(line for line in cell["source"] if not line.startswith(("%", "!")))


def _is_definition(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return all(ast.unparse(call.func) in CALLS for call in ast.walk(node) if isinstance(call, ast.Call))
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
