"""SASS, the machine code of NVIDIA's GPUs: instructions with their control words, and loops.

Read from what nvdisasm and cuobjdump print. Since Volta a control word says how the compiler has scheduled an
instruction: after how many cycles the warp's next one may issue (a stall count, for results whose latency is fixed),
and which of a warp's six scoreboards it sets and waits for (for all other results).

Code that is kept is written as lines: the scoreboards that an instruction waits for (B), those that it sets until its
operands are read (R) and until its result is there (W), its stall count (S), then the instruction itself. A jump names
the instruction that it goes to by its number::

    B0-----:R-:W2:S02  LDS.128 R4, [R8]
    B--2---:R-:W-:S05  @P0 BRA -> 0
"""

import lzma
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

Loop = tuple[int, int]  # the numbers of its first and last instruction; the last one jumps back
SCOREBOARDS = range(6)


class Control(NamedTuple):
    """A control word, as far as it says when instructions may issue."""

    waits: tuple[int, ...]
    reads: int | None  # the scoreboard that is set until the operands are read,
    writes: int | None  # and the one until the result is there
    stall: int

    @classmethod
    def decoded(cls, encoding: int) -> "Control":
        """Of the second 64 bits of an instruction."""
        bits = encoding >> 41
        waits = tuple(n for n in SCOREBOARDS if bits >> 11 + n & 1)
        reads, writes = (n if n in SCOREBOARDS else None for n in (bits >> 8 & 7, bits >> 5 & 7))
        return cls(waits, reads, writes, bits & 15)

    @classmethod
    def parsed(cls, text: str) -> "Control":
        """Of what `str` makes of one."""
        waits, reads, writes, stall = (field[1:] for field in text.split(":"))
        number = {"-": None} | {str(n): n for n in SCOREBOARDS}
        return cls(tuple(int(n) for n in waits if n != "-"), number[reads], number[writes], int(stall))

    def __str__(self) -> str:
        waits = "".join(str(n) if n in self.waits else "-" for n in SCOREBOARDS)
        reads, writes = ("-" if n is None else n for n in (self.reads, self.writes))
        return f"B{waits}:R{reads}:W{writes}:S{self.stall:02}"


class Instruction(NamedTuple):
    """An instruction. What is never run, behind the predicate !PT, has the name "@!PT"."""

    name: str  # with its modifiers, as in "LDS.128"
    operands: str = ""
    predicate: str = ""  # as in "@!P0"
    target: int | None = None  # of a jump inside the same code: the number of an instruction
    control: Control | None = None  # None where no encodings were printed

    @property
    def kind(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @property
    def bytes(self) -> int:
        """What each lane loads or stores."""
        if self.kind == "LDSM":  # as in "LDSM.16.M88.4": so many matrices, of which a lane has four bytes each
            return 4 * int(self.name.rsplit(".", 1)[1]) if self.name[-1].isdigit() and ".M88." in self.name else 4
        return 16 if ".128" in self.name else 8 if ".64" in self.name else 4

    @classmethod
    def parsed(cls, line: str) -> "Instruction":
        """Of what `str` makes of one that has a control word."""
        control, text = line.split(maxsplit=1)
        text, _, target = text.partition(" -> ")
        return cls(*_words(text), int(target) if target else None, Control.parsed(control))

    def __str__(self) -> str:
        words = [self.predicate, self.name, self.operands, "" if self.target is None else f"-> {self.target}"]
        return f"{self.control}  {' '.join(word for word in words if word)}"


Code = list[Instruction]


def _words(text: str) -> tuple[str, str, str]:
    """Name, operands and predicate."""
    predicate, name, operands = re.fullmatch(r"(@!?U?P\d+)?\s*(\S+)\s*(.*)", text).groups("")  # type: ignore[union-attr]
    return name, operands, predicate


def disassembled(text: str) -> Code:
    """The instructions of one kernel, of what nvdisasm or cuobjdump print of it, with encodings or without."""
    found: list[list] = []  # text, control
    places: dict[str, int] = {}  # of labels and addresses
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            places[f"0x{instruction[1].lstrip('0') or 0}"] = len(found)
            found.append([instruction[2], None])
        elif found and (encoding := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):
            found[-1][1] = Control.decoded(int(encoding[1], 16))
    code = []
    for line, control in found:
        name, operands, predicate = _words(line)
        target = None
        if name.startswith("BRA") and (jump := re.search(r"(?:`\((\.L_x_\d+)\)|(0x[0-9a-f]+))$", operands)):
            operands, target = operands[: jump.start()].rstrip(), places.get(jump[1] or jump[2])
        code.append(Instruction(name, operands, predicate, target, control))
    return code


def loops(code: Code) -> list[Loop]:
    """All loops, shortest first; but not the endless one of one instruction that pads the end of a kernel."""
    found = {(i.target, n) for n, i in enumerate(code) if i.target is not None and i.target < n}
    return sorted(found, key=lambda loop: (loop[1] - loop[0], loop))


def within(inner: Loop, outer: Loop) -> bool:
    """Whether a loop is a part of another one."""
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def innermost(found: Sequence[Loop]) -> list[Loop]:
    """Those of some loops that none of the others is a part of."""
    return [loop for loop in found if not any(within(other, loop) for other in found)]


def cut(code: Code, loop: Loop) -> Code:
    """The instructions of a loop, numbered anew."""
    first, last = loop
    moved = {n: n - first for n in range(first, last + 1)}
    return [i if i.target is None else i._replace(target=moved.get(i.target)) for i in code[first : last + 1]]


def write(path: Path, title: str, kept: dict[str, Code]) -> None:
    """Keep pieces of code by their names, below a line that says what they are."""
    pieces = ["\n".join([name, *map(str, code)]) for name, code in kept.items()]
    path.write_bytes(lzma.compress("\n\n".join([title, *pieces, ""]).encode(), preset=9))


def read(path: Path) -> tuple[str, dict[str, Code]]:
    """What `write` has kept: the title, and the pieces."""
    title, *pieces = lzma.decompress(path.read_bytes()).decode().strip().split("\n\n")
    named = (piece.splitlines() for piece in pieces)
    return title, {name: [Instruction.parsed(line) for line in lines] for name, *lines in named}
