"""Why a model does not run: the line, its tensors, the axis that is missing, and the layer to use instead."""

import ast
import inspect
import itertools
import linecache
import site
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

ELEMENTWISE = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
PLAIN_NODES = (
    ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Tuple, ast.Constant, ast.UnaryOp, ast.USub, ast.Load,
)  # fmt: skip # of expressions that can be evaluated again without a side effect
LETTERS = ("I", "J", "D_out", "D_in")
ARGUMENTS = {"in_capsules": "I", "in_dim": "D_in", "out_capsules": "J", "out_dim": "D_out"}  # as attributes
ITERATIONS = ("num_iterations", "num_routing", "num_routings", "routings", "iterations", "n_iterations", "num_iters")
OURS, TORCHS = Path(__file__).parents[1], Path(torch.__file__).parent
LIBRARIES = [OURS, *map(Path, [*site.getsitepackages(), sysconfig.get_paths()["stdlib"]])]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Failure:
    """An error in other people's code, explained.

    Attributes:
        path: of the module in whose ``forward`` it was raised; empty for the model itself.
        text: the error, the line, and the tensors in it.
        fix: what to do.
    """

    path: str
    text: str
    fix: str

    def __str__(self) -> str:
        return f"{self.text}; fix: {self.fix}"


@dataclass(frozen=True)
class _Line:
    """The failing statement, the tensors in its failing part by how they are written, and the part itself."""

    where: str
    statement: str
    operands: dict[str, Any]
    part: ast.AST | None


def explain_failure(error: Exception, model: nn.Module) -> Failure:
    """Explain an error that a call of a model raised.

    Args:
        error: the error.
        model: the model that was called.

    Example:
        >>> class Broken(nn.Module):
        ...     def forward(self, x):
        ...         return x[:, :2] + x
        >>> model = Broken()
        >>> try:
        ...     model(torch.zeros(5, 3))
        ... except RuntimeError as error:
        ...     explain_failure(error, model).path
        ''
    """
    raised = f"{type(error).__name__}: {error}".splitlines()[0]
    frames = _users_frames(error.__traceback__, model)
    if not frames:
        return Failure("", raised, "call it with what its forward takes")
    paths = {module: path for path, module in model.named_modules()}
    layer, poses = _layer(frames, paths)
    line = _line(*frames[-1])
    sizes = _sizes(layer, poses) if layer is not None else {}
    named = ", ".join(f"{name} {_described(value, sizes)}" for name, value in line.operands.items())
    text = f"{raised}; {line.where}: {line.statement}" + (f"; {named}" if named else "")
    conflict = _conflict(line, sizes)
    if conflict:
        text = f"{text}; {conflict[0]}"
    fixes = [*conflict[1:], *_replacement(layer, poses, sizes)]
    return Failure(paths.get(layer, "") if layer is not None else "", text, "; ".join(fixes) or "mend that line")


# ------------------------------------------------------------------------------------------------------------ the line


def _users_frames(tb: TracebackType | None, model: nn.Module) -> list[tuple[FrameType, int, int]]:
    """The frames of the user's code in a model, with line and instruction; of an installed one, all but torch's."""
    frames = []
    while tb is not None:
        frames.append((tb.tb_frame, tb.tb_lineno, tb.tb_lasti))
        tb = tb.tb_next
    frames = list(itertools.dropwhile(lambda f: f[0].f_locals.get("self") is not model, frames))
    own = [f for f in frames if not any(_file(f[0]).is_relative_to(library) for library in LIBRARIES)]
    return own or [f for f in frames if not any(_file(f[0]).is_relative_to(library) for library in (OURS, TORCHS))]


def _file(frame: FrameType) -> Path:
    return Path(frame.f_code.co_filename)


def _line(frame: FrameType, number: int, instruction: int) -> _Line:
    """What stands on a line, and what the names in it mean."""
    file = frame.f_code.co_filename
    where = f"{Path(file).name}:{number}"
    source = linecache.getlines(file, frame.f_globals)
    try:
        tree = ast.parse("".join(source))
    except SyntaxError:  # a cell of a notebook with a magic command
        tree = ast.Module([], [])
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= number <= (n.end_lineno or 0)]
    if not statements:
        return _Line(where, source[number - 1].strip() if 0 < number <= len(source) else "?", {}, None)
    statement = min(statements, key=lambda node: (node.end_lineno or 0) - node.lineno)
    part = _failing_part(statement, frame, instruction)
    operands = _operands(part, frame) or _operands(statement, frame)
    text = " ".join(ast.unparse(statement).splitlines()[0].split())
    return _Line(where, text, operands, part)


def _failing_part(statement: ast.stmt, frame: FrameType, instruction: int) -> ast.AST:
    """The expression of the statement that failed, from Python 3.11 on; else the statement."""
    positions = getattr(frame.f_code, "co_positions", None)
    if positions is None:
        return statement
    place = next(itertools.islice(positions(), instruction // 2, None), None)
    for node in ast.walk(statement):
        if isinstance(node, ast.expr) and place == (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset):
            return node
    return statement


def _operands(node: ast.AST, frame: FrameType) -> dict[str, Any]:
    """The tensors, modules and sizes in an expression, by how they are written, in that order."""
    found: dict[str, Any] = {}

    def look(node: ast.AST) -> None:
        plain = isinstance(node, ast.expr) and all(
            isinstance(part, (*PLAIN_NODES, ast.slice)) for part in ast.walk(node)
        )
        if plain and not isinstance(node, (ast.Constant, ast.Tuple)):
            value = _value(node, frame)
            if isinstance(value, nn.Module) or type(value) is int or (isinstance(value, Tensor) and not is_lazy(value)):
                found[ast.unparse(node)] = value
                return
        for child in ast.iter_child_nodes(node):
            look(child)

    look(node)
    return found


def _value(node: ast.AST, frame: FrameType) -> Any:
    """What an expression without calls is worth; None where it is worth nothing."""
    try:
        code = compile(ast.Expression(node), "<line>", "eval")  # type: ignore[arg-type]
        with torch.no_grad():
            return eval(code, frame.f_globals, frame.f_locals)
    except Exception:
        return None


def _described(value: Any, sizes: dict[str, int]) -> str:
    """A tensor's shape, with the letters of capsules where they are known; a module; a number."""
    if isinstance(value, nn.Module):
        return f"= {type(value).__name__}({value.extra_repr()})"
    if not isinstance(value, Tensor):
        return f"= {value}"
    letters = _lettered(tuple(value.shape), sizes)
    known = any(letter in LETTERS for letter in letters)
    return f"{list(value.shape)}" + (f" = [{', '.join(letters)}]" if known else "")


# ----------------------------------------------------------------------------------------------------- in capsule terms


def _layer(frames: Sequence[tuple[FrameType, int, int]], paths: dict[nn.Module, str]) -> tuple[Any, Tensor | None]:
    """The innermost module of the user that was running, and the first tensor that it was given."""
    for frame, _, _ in reversed(frames):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in paths:
            values = (frame.f_locals.get(name) for name in frame.f_code.co_varnames[1 : frame.f_code.co_argcount])
            return module, next((value for value in values if isinstance(value, Tensor)), None)
    return None, None


def _sizes(layer: nn.Module, poses: Tensor | None) -> dict[str, int]:
    """B, I, J, D_in and D_out of a capsule layer, as far as its matrices, its attributes and its input tell them.

    The matrices have four axes: two of capsules, then two of entries, each in either order, and J before D_out.
    """
    sizes = {letter: vars(layer)[name] for name, letter in ARGUMENTS.items() if type(vars(layer).get(name)) is int}
    given = list(poses.shape[1:]) if poses is not None else []
    for parameter in filter(lambda p: not is_lazy(p), layer.parameters(recurse=False)):
        shape = [size for n, size in enumerate(parameter.shape) if size > 1 or n > parameter.dim() - 5]
        if len(shape) != 4 or len(sizes) == len(LETTERS):
            continue
        orders = [
            dict(zip(order, shape, strict=True))
            for order in (("I", "J", "D_out", "D_in"), ("I", "J", "D_in", "D_out"), ("J", "I", "D_out", "D_in"),
                          ("J", "I", "D_in", "D_out"))
        ]  # fmt: skip
        best = max(orders, key=lambda s: (s["I"] in given) + (s["D_in"] in given))
        if best["D_in"] in given or best["I"] in given:
            sizes = best | sizes
    return sizes | ({"B": len(poses)} if poses is not None and poses.dim() and sizes else {})


def _lettered(shape: Shape, sizes: dict[str, int]) -> list[str]:
    """The letters of a tensor's axes; of several with one size each once, in the usual order; else the size."""
    letters: list[str] = []
    for n, size in enumerate(shape):
        fitting = [name for name in ("B", *LETTERS) if sizes.get(name) == size and name not in letters and size > 1]
        if n:
            fitting = [name for name in fitting if name != "B"] or fitting
        letters.append(fitting[0] if fitting else str(size))
    return letters


def _conflict(line: _Line, sizes: dict[str, int]) -> tuple[str, ...]:
    """Why the two tensors of an operation do not fit, and what to do; empty where that is not known."""
    part = line.part
    tensors = [(name, tuple(v.shape)) for name, v in line.operands.items() if isinstance(v, Tensor)]
    if not isinstance(part, ast.BinOp) or len(tensors) != 2:
        return ()
    (a, shape), (b, other) = tensors
    if isinstance(part.op, ast.MatMult):
        if len(shape) > 1 and len(other) > 1 and shape[-1] != other[-2]:
            return (
                f"a product wants the last axis of {a} ({shape[-1]}) as large as the second last of {b} ({other[-2]})",
            )
        return _other_sizes(a, shape[:-2], b, other[:-2], sizes)
    if not isinstance(part.op, ELEMENTWISE):
        return ()
    if len(shape) > len(other):
        (a, shape), (b, other) = (b, other), (a, shape)
    missing = next(_missing_axes(shape, other), None)
    if missing is None or len(shape) == len(other):
        return _other_sizes(a, shape, b, other, sizes)
    letters = _lettered(other, sizes)
    what = " and ".join(f"{letters[n]}, axis {n} of {b} (size {other[n]})" for n in missing)
    more = "".join(f".unsqueeze({n})" for n in missing)
    return f"{a} has no axis for {what}", f"write {a}{more} there" if a.isidentifier() else f"give {a} that axis"


def _missing_axes(shape: Shape, other: Shape) -> Iterator[tuple[int, ...]]:
    """The axes of a longer shape to which a shorter one, with axes of 1 there, can be broadcast; long axes first."""
    count = len(other) - len(shape)
    for axes in sorted(
        itertools.combinations(range(len(other)), count), key=lambda axes: [other[n] == 1 for n in axes]
    ):
        rest = iter(shape)
        filled = [1 if n in axes else next(rest) for n in range(len(other))]
        if all(a == b or 1 in (a, b) for a, b in zip(filled, other, strict=True)):
            yield axes


def _other_sizes(a: str, shape: Shape, b: str, other: Shape, sizes: dict[str, int]) -> tuple[str, ...]:
    """Which axes of two shapes, from the last one on, have other sizes."""
    if sorted(shape) == sorted(other) and shape != other:
        return (f"{a} and {b} have the same axes in another order", f"permute one of {a} and {b}")
    letters = {name: _lettered(given, sizes) for name, given in ((a, shape), (b, other))}
    for n in range(1, min(len(shape), len(other)) + 1):
        if shape[-n] != other[-n] and 1 not in (shape[-n], other[-n]):
            here, there = (
                f"{given[-n]} in {name}"
                if letters[name][-n] == str(given[-n])
                else f"{letters[name][-n]} = {given[-n]} in {name}"
                for name, given in ((a, shape), (b, other))
            )
            return (f"an axis is {here} and {there}",)
    return ()


def _replacement(layer: nn.Module | None, poses: Tensor | None, sizes: dict[str, int]) -> list[str]:
    """The layer of fastcaps that does what a capsule layer is meant to do; empty for other layers."""
    if layer is None or not all(letter in sizes for letter in LETTERS):
        return []
    if poses is not None and sizes["I"] not in poses.shape[1:]:
        return [f"its matrices are made for {sizes['I']} input capsules: make it for as many as come in"]
    T = next((vars(layer)[name] for name in ITERATIONS if type(vars(layer).get(name)) is int), 3)
    squeezed = poses is not None and poses.dim() == 4 and poses.shape[-1] == 1
    name = next(iter(list(inspect.signature(type(layer).forward).parameters)[1:]), "poses")
    what = f"{name}.squeeze(-1)" if squeezed else f"poses [B, {sizes['I']}, {sizes['D_in']}]"
    arguments = f"{sizes['I']}, {sizes['D_in']}, {sizes['J']}, {sizes['D_out']}, num_iterations={T}"
    return [f"or use fastcaps.CapsuleLayer({arguments}) instead: it takes {what}, and routes as in the paper"]
