"""How many cycles the sweeps of the native CUDA kernels take by the cycle model, without a GPU.

    make gpu-static                                  # the table; writes results/gpu-cycles.json and sass-current.txt.xz
    python benchmarks/gpu_cycles.py --json           # a row for each pass and precision
    python benchmarks/gpu_cycles.py variant.cubin    # of kernels compiled alone: nvcc -cubin
    python benchmarks/gpu_cycles.py benchmarks/results/sass-6cb0157.txt.xz    # of loops that were kept

A unit is what 8 samples, one input capsule and a tile of 10 output capsules of 16 entries take, as in cuda_static.
`slots` are its instructions, `alone` are the cycles of a warp that has the scheduler for itself. With `warps` of them a
unit takes `cycles` of the scheduler, which it keeps the pipes `busy` for; "shared" is the path to shared memory.
`spill_bytes` are those of a lane's registers that the loop keeps in local memory. All is of plain forms for sm_90.
"""

import argparse
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import sass
from cycle_model import INTERVALS, L2_OF_8_WARPS, L2_OF_12_WARPS, MOSTLY_L1, Constant, busy, cycles
from sass import Code

from fastcaps.routing import backend

RESULTS = Path(__file__).parent / "results"
CURRENT = RESULTS / "sass-current.txt.xz"
TABLE = RESULTS / "gpu-cycles.json"
ARCHITECTURE = "sm_90"
FORMS = {"float32": "float, false", "tf32": "float, true", "bfloat16": "bfloat16, false"}
CHUNK, RING_CHUNK = 4, 3  # input capsules whose matrices a sweep loads, or copies to its ring, at a time


class Pass(NamedTuple):
    """A loop of the kernels by tensor cores. `Form` and `Tile` are left out of the kernel's name."""

    kernel: str
    warps: int  # of a scheduler: as many blocks are resident as registers let
    softmax: bool = True  # whether there are exponentials in it: one kernel has a loop with and one without
    chunk: int = 0  # input capsules of a round, where their matrices come meanwhile: the loop around is meant then
    load: Constant = L2_OF_12_WARPS

    @property
    def units(self) -> int:
        """Of a round."""
        return self.chunk or 1


PASSES = {
    "uniform": Pass("tile_persistent<{}, false>", warps=3, softmax=False),
    "softmax": Pass("tile_persistent<{}, false>", warps=3),
    "backward": Pass("tile_persistent<{}, true>", warps=2),
    "last": Pass("tile_gradients<{}>", warps=2, load=MOSTLY_L1),
    # Where the matrices and poses of a block do not fit into shared memory:
    "uniform, streamed": Pass("tile_sweep<{}, uniform, false>", warps=3, softmax=False, chunk=CHUNK),
    "softmax, streamed": Pass("tile_sweep<{}, softmax, false>", warps=3, chunk=CHUNK),
    "backward, streamed": Pass("tile_sweep<{}, softmax, true>", warps=2, chunk=CHUNK, load=L2_OF_8_WARPS),
    # The same for many samples of float32:
    "uniform, ring": Pass("tile_ring_sweep<{}, uniform, false>", warps=3, softmax=False, chunk=RING_CHUNK),
    "softmax, ring": Pass("tile_ring_sweep<{}, softmax, false>", warps=3, chunk=RING_CHUNK),
    "backward, ring": Pass("tile_ring_sweep<{}, softmax, true>", warps=2, chunk=RING_CHUNK, load=L2_OF_8_WARPS),
}


def name_of(kernel: Pass, precision: str) -> str:
    """As cuda_static writes it."""
    return kernel.kernel.format(f"Form<{FORMS[precision]}, true>, Tile<10, 16>")


def has(code: Code, *kinds: str) -> bool:
    """Whether there is an instruction of one of these kinds."""
    return any(instruction.kind in kinds for instruction in code)


def loop_of(kernel: Code, wanted: Pass) -> Code:
    """The loop of a kernel that a pass is: the longest innermost one with matrix instructions, but for one that takes
    the largest logit where another need not; or the loop around it."""

    def inside(loop: sass.Loop) -> Code:
        return kernel[loop[0] : loop[1] + 1]

    matrix = [loop for loop in sass.loops(kernel) if has(inside(loop), "HMMA", "HGMMA")]
    units = [loop for loop in sass.innermost(matrix) if has(inside(loop), "MUFU") == wanted.softmax]
    unit = ([loop for loop in units if not has(inside(loop), "FMNMX")] or units)[-1]
    return sass.cut(kernel, next(loop for loop in matrix if sass.within(unit, loop)) if wanted.chunk else unit)


def loops_of(file: Path) -> dict[str, Code]:
    """All passes' loops, by precision and pass; of kept ones, of a cubin, or of the extension."""
    if file.name.endswith(".txt.xz"):
        return sass.read(file)[1]
    import cuda_static  # and with it Triton, which has the tools that read machine code

    with tempfile.TemporaryDirectory() as folder, ThreadPool() as pool:
        files = [file]
        if file == cuda_static.EXTENSION:
            cuda_static.extract(ARCHITECTURE, folder)
            files = sorted(Path(folder).glob("*.cubin"))
        kernels = {name: code for found in pool.map(kernels_of, files) for name, code in found.items()}
    return {
        f"{precision}, {name}": loop_of(kernels[name_of(wanted, precision)], wanted)
        for precision in FORMS
        for name, wanted in PASSES.items()
        if name_of(wanted, precision) in kernels
    }


def kernels_of(file: Path) -> dict[str, Code]:
    """The kernels of all passes that a cubin has, by name."""
    import cuda_static

    mangled = list(cuda_static.usage(file))
    names = dict(zip(mangled, cuda_static.demangled(mangled), strict=True))
    wanted = {name_of(p, precision) for p in PASSES.values() for precision in FORMS}
    chosen = ",".join(symbol for symbol, name in names.items() if name in wanted)
    if not chosen:
        return {}
    printed = cuda_static.tool("cuobjdump", "-sass", "-fun", chosen, file)
    sections = re.split(r"\s+Function : (\S+)", printed)[1:]
    return {names[symbol]: sass.disassembled(text) for symbol, text in zip(sections[::2], sections[1::2], strict=True)}


def nested_rounds(loop: Code, chunk: int = CHUNK) -> int:
    """How often a loop inside a pass's loop runs in a round of that, for the paper's layer."""
    if has(loop, "HMMA", "HGMMA"):
        return chunk
    if has(loop, "MUFU"):
        return 2  # of three iterations, as the first has a constant coupling and no round
    loads = sum(instruction.kind == "LDG" for instruction in loop)
    return 2 if loads == 4 else 1  # eight loads of a lane in the first section of a tile, four on their way at a time


def played(loop: Code, rounds: Callable[[Code], int] = nested_rounds) -> Code:
    """What is issued in a round of a loop: everything once, as if no jump forward was taken, and loops inside as often
    as `rounds` says."""
    inside = [inner for inner in sass.loops(loop) if inner != (0, len(loop) - 1)]
    result: Code = []
    done = 0
    for first, last in sorted(inner for inner in inside if not any(sass.within(inner, other) for other in inside)):
        body = sass.cut(loop, (first, last))
        result += [*loop[done:first], *played(body, rounds) * rounds(body)]
        done = last + 1
    return [*result, *loop[done:]]


def spill_bytes(loop: Code) -> int:
    """How much of local memory the loop reaches into, for each lane."""
    places: set[int] = set()
    for instruction in loop:
        if instruction.kind in ("LDL", "STL"):
            offset = re.search(r"\+(0x[0-9a-f]+)\]", instruction.operands)
            start = int(offset[1], 16) if offset else 0
            places.update(range(start, start + instruction.bytes))
    return len(places)


def tabled(name: str) -> bool:
    """Whether a pass has a row: not those that wait for loads, whose latency is a guess."""
    return "streamed" not in name


def rows(loops: dict[str, Code]) -> list[dict[str, Any]]:
    """A row for each precision and pass whose data lie in shared memory, or are on their way there."""
    found = []
    for precision in FORMS:
        for name, wanted in PASSES.items():
            if not tabled(name) or f"{precision}, {name}" not in loops:
                continue
            code = played(loops[f"{precision}, {name}"], partial(nested_rounds, chunk=wanted.chunk))
            row = {"pass": name, "precision": precision, "warps": wanted.warps, "slots": len(code) // wanted.units}
            row["alone"] = round(cycles(code, 1, wanted.load) / wanted.units, 1)
            row["cycles"] = round(cycles(code, wanted.warps, wanted.load) / wanted.warps / wanted.units, 1)
            row["busy"] = {pipe: round(time / wanted.units) for pipe, time in busy(code).items()}
            row["spill_bytes"] = spill_bytes(code)
            found.append(row)
    return found


def text(found: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    pipes = [pipe for pipe in INTERVALS if any(pipe in row["busy"] for row in found)]
    lines = [f"{'':<20} warps slots  alone cycles spill | busy: " + " ".join(f"{pipe:>7}" for pipe in pipes)]
    for row in found:
        place = f"{row['precision']}, {row['pass']}"
        counts = f"{row['warps']:>5} {row['slots']:>5} {row['alone']:>6} {row['cycles']:>6} {row['spill_bytes']:>5}"
        lines.append(f"{place:<20} {counts} |       " + " ".join(f"{row['busy'].get(pipe, 0):>7}" for pipe in pipes))
    return "\n".join(lines)


def as_lines(found: list[dict[str, Any]]) -> str:
    """The rows as JSON, one a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]"


def installed() -> Path | None:
    """The extension, if it has CUDA kernels and there are tools to read them."""
    if "CUDA" not in (backend.EXTENSION_BUILD or "") or not importlib.util.find_spec("triton"):
        return None
    import cuda_static

    return cuda_static.EXTENSION


def keep(file: Path, loops: dict[str, Code]) -> str:
    """Write loops to a file; returns the version of the compiler on the PATH, which is its title."""
    import cuda_static

    compiler = f"nvcc {cuda_static.compiler()}"
    sass.write(file, compiler, loops)
    return compiler


def main() -> int:
    """Print the table; with --write, keep it and the loops for the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "file", nargs="?", type=Path, help="default: the installed extension, else the loops kept of one"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--keep", type=Path, metavar="FILE.txt.xz", help="keep the loops in a file")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} and {CURRENT.name}")
    arguments = parser.parse_args()
    file = arguments.file or installed() or CURRENT
    if not arguments.file and file == CURRENT:
        print(f"gpu_cycles: no CUDA kernels are installed; these are the loops in {CURRENT}", file=sys.stderr)
    if not file.is_file():
        parser.error(f"no such file: {file}")
    loops = loops_of(file)
    if not (found := rows(loops)):
        parser.error(f"{file} has none of the kernels of PASSES for {ARCHITECTURE}; the names are those of cuda_static")
    print(as_lines(found) if arguments.json else text(found))
    if arguments.keep:
        keep(arguments.keep, loops)
    if arguments.write:
        TABLE.write_text(f'{{"compiler": "{keep(CURRENT, loops)}", "rows": {as_lines(found)}}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
