"""What the compiler made of the native CUDA kernels, without a GPU: registers, spills, instructions.

    make gpu-static    # prints the tables and writes benchmarks/results/cuda-static.json, with which a test compares

Read from the extension that is installed, so what is looked at is what runs. Of a kernel by tensor cores the loop that
has its matrix instructions is counted (in the last sweep with the loop over iterations as often as three of them run),
per unit: 8 samples times one input capsule times a tile of output capsules, which is one round of that loop.
"""

import argparse
import collections
import itertools
import json
import re
import subprocess
import sys
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import sass
import triton

import fastcaps

RESULTS = Path(__file__).parent / "results" / "cuda-static.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
EXTENSION = next(iter(sorted(Path(fastcaps.__file__).parent.glob("_C*.so"))), None)
SWEEPS = ("uniform", "softmax", "with_stats", "stats_only")
CLASSES = {
    "matrix": ("HMMA",), "FFMA": ("FFMA", "FMUL", "FADD"), "special": ("MUFU",), "shuffle": ("SHFL",),
    "LDS": ("LDS", "LDSM"), "LDG": ("LDG",), "local": ("LDL", "STL"),
}  # fmt: skip


def tool(name: str, *arguments: Any) -> str:
    """What one of the binary tools prints."""
    command = [TOOLS / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> list[str]:
    """Names of kernels as in the source, shorter."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = re.sub(r"\(fastcaps::cuda::Sweep\)(\d)", lambda m: SWEEPS[int(m[1])], text)
    short = re.sub(r"void |fastcaps::cuda::|fastcaps::|\(fastcaps::cuda::\w+(<\w+>)?\)", "", short)
    return [line.replace(" >", ">") for line in short.splitlines()]


def instructions(section: str) -> tuple[list[str], list[sass.Loop]]:
    """The names of a kernel's instructions, and its loops (first, last), shortest first."""
    code = sass.disassembled(section)
    return [instruction.name for instruction in code], sass.loops(code)


def counted(names: list[str]) -> dict[str, int]:
    """How many instructions of each class, all of them ("slots"), and loads of 16 bytes."""
    kinds = collections.Counter(name.split(".")[0] for name in names)
    wide = {
        f"{kind} 16 bytes": sum(n.startswith(kind) and (".128" in n or ".M88.4" in n) for n in names)
        for kind in ("LDS", "LDG")
    }
    return {"slots": len(names), **{k: sum(kinds[i] for i in group) for k, group in CLASSES.items()}, **wide}


def unit(names: list[str], loops: list[sass.Loop], gradients: bool, plain: bool) -> dict[str, int]:
    """One round of the loop over input capsules or samples: the innermost with matrix instructions; of several the
    longest, but for one that takes the largest logit where another need not; without `plain` the loop around it, as
    the innermost is then the one over D_in."""
    matrix = [loop for loop in loops if any(name.startswith("HMMA") for name in names[loop[0] : loop[1] + 1])]
    innermost = sass.innermost(matrix)
    unshifted = [(a, b) for a, b in innermost if takes_softmax(names[a : b + 1], shifted=False)]
    first, last = (unshifted or innermost)[-1]
    if not plain:
        first, last = next(loop for loop in matrix if sass.within((first, last), loop))
    total = collections.Counter(counted(names[first : last + 1]))
    if gradients:  # one iteration is in there: of three, the first is the uniform one and goes another, short way
        for inner in loops:
            if sass.within(inner, (first, last)):
                total.update(counted(names[inner[0] : inner[1] + 1]))
    return dict(total)


def takes_softmax(names: list[str], shifted: bool) -> bool:
    """Whether a loop takes powers of two, and looks for a largest logit or does not."""
    return "MUFU.EX2" in names and shifted == any(name.startswith("FMNMX") for name in names)


def compiler() -> str:
    """The version of the CUDA compiler on the PATH."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said)[1]  # type: ignore[index]


def extract(architecture: str, folder: str) -> None:
    """The extension's machine code for an architecture, as files *.cubin."""
    command = [TOOLS / "cuobjdump", "-xelf", architecture, EXTENSION]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)


def usage(file: Path) -> dict[str, str]:
    """What the kernels of a file of machine code use, by their mangled names: registers and stack."""
    return dict(re.findall(r"Function (\S+):\s+(REG:\d+ STACK:\d+)", tool("cuobjdump", "-res-usage", file)))


def table(architectures: list[str]) -> list[dict[str, Any]]:
    """A row for each kernel and architecture of the extension."""
    with tempfile.TemporaryDirectory() as folder, ThreadPool() as pool:  # the time is that of the tools
        for architecture in architectures:
            extract(architecture, folder)
        found = pool.map(kernels, sorted(Path(folder).glob("*.cubin")))
    return sorted(itertools.chain(*found), key=lambda row: (row["architecture"], row["kernel"]))


def kernels(file: Path) -> list[dict[str, Any]]:
    """The rows of one file of machine code."""
    architecture = file.name.split(".")[-2]
    used = usage(file)
    sections = re.split(r"(?=\.section\s+\.text\.)", tool("nvdisasm", "-c", file))[1:]
    mangled = [re.match(r"\.section\s+\.text\.([^,\s]+)", section)[1] for section in sections]  # type: ignore[index]
    rows = []
    for section, symbol, name in zip(sections, mangled, demangled(mangled), strict=True):
        registers, stack = (int(n) for n in re.findall(r"\d+", used[symbol]))
        names, loops = instructions(section)
        row = {"architecture": architecture, "kernel": name, "registers": registers, "stack": stack}
        row["all"] = counted(names)
        if name.startswith("tile_"):
            row["unit"] = unit(names, loops, "gradients" in name, plain(row))
        rows.append(row)
    return rows


def plain(row: dict[str, Any]) -> bool:
    """Whether it is a kernel by tensor cores in the form whose loop has no branches: there a unit is what it says."""
    return row["kernel"].startswith("tile_") and ", true>, Tile" in row["kernel"]


def text(rows: list[dict[str, Any]]) -> str:
    """The rows of plain kernels, as a table."""
    columns = ["slots", *CLASSES]
    lines = [f"{'':<74} {'':>6} regs stack " + " ".join(f"{c:>8}" for c in columns)]
    for row in rows:
        if plain(row):
            counts = " ".join(f"{row['unit'][c]:>8}" for c in columns)
            place = f"{row['kernel']:<74} {row['architecture']:>6}"
            lines.append(f"{place} {row['registers']:>4} {row['stack']:>5} {counts}")
    return "\n".join(lines)


def main() -> int:
    """Print the table; with --write, keep it for the test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="sm_80,sm_90,sm_100,sm_120")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    rows = table(arguments.architectures.split(","))
    print(text(rows))
    if arguments.write:
        lines = ",\n".join(json.dumps({k: row[k] for k in row if k != "all"}) for row in rows if plain(row))
        RESULTS.write_text(f'{{"nvcc": "{compiler()}", "rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
