"""How many cycles a loop of SASS takes on a scheduler, a quarter of a multiprocessor, with some warps; without a GPU.

A warp issues its next instruction when the stall count of the one before has passed, the scoreboards that it waits for
are clear and its pipe is free. Of several warps that can issue, the one that issued last does, else the next in turn.
An instruction keeps its pipe for an interval. Fixed latencies are in the compiler's stall counts; those of all other
results are below. Shared memory and shuffles have one path for the four schedulers of a multiprocessor. These run the
same code, so each has a quarter of it.

Not in the model: conflicts of shared memory's banks, misses of the instruction cache, barriers of a block, and
schedulers that are at different places of the loop.
"""

import collections
import math
import re
from typing import NamedTuple

from sass import SCOREBOARDS, Code, Control, Instruction


class Constant(NamedTuple):
    """Cycles, and where they come from."""

    cycles: float
    source: str


GUIDE = "CUDA programming guide, throughput of arithmetic instructions, compute capability 9.0"
ASSUMED = "assumed, not measured"
FITTED = "fitted to results/gpu-nvidia-h200-1.json"

# Between two instructions of a pipe.
INTERVALS = {
    "FMA": Constant(1, f"{GUIDE}: 128 lanes of a multiprocessor"),
    "ALU": Constant(2, f"{GUIDE}: 64"),
    "special": Constant(8, f"{GUIDE}: 16"),
    "tensor": Constant(6.4, "m16n8k8 in tf32: 308 TFLOP/s in results/gpu-nvidia-h200-1.json, if that was at 1.83 GHz"),
    "wgmma": Constant(0.55, "a column of m64nNk8 in tf32: half a cycle by the peak rate, 10 % more assumed"),
    "shared": Constant(4, "4 bytes a lane, or a shuffle: 128 bytes a cycle and multiprocessor, for four schedulers"),
}
# From issue until the scoreboard of the result is clear.
LATENCIES = {
    "LDS": Constant(30, ASSUMED),
    "LDS.64": Constant(31, ASSUMED),
    "LDS.128": Constant(34, ASSUMED),
    "SHFL": Constant(25, ASSUMED),
    "MUFU": Constant(22, ASSUMED),
    "LDC": Constant(60, ASSUMED),
    "S2R": Constant(40, ASSUMED),
    "REDUX": Constant(30, ASSUMED),
    "HGMMA": Constant(40, f"{ASSUMED}; after its interval"),
    "operands": Constant(12, f"{ASSUMED}; until they are read, of stores and others that do so late"),
    "others": Constant(20, ASSUMED),
}
# The same for loads from global memory: it depends on where the data of a loop lie.
L2_OF_12_WARPS = Constant(850, f"{FITTED}, sweeps of the forward at B = 1024: 8 lines an instruction")
L2_OF_8_WARPS = Constant(700, f"{FITTED}, sweeps of the backward at B = 1024: less traffic")
MOSTLY_L1 = Constant(300, f"{FITTED}, last sweep: three of the four warps of a block find V and ds in L1")
CLOCK_GHZ = 1.755  # assumed for an H200 under load, whose highest is 1.98

FREE = "free"  # the pipe of what has one that is never the limit
KINDS = {
    "FMA": ("FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "FSWZADD"),
    "special": ("MUFU",),
    "tensor": ("HMMA",),
    "wgmma": ("HGMMA",),
    "shared": ("LDS", "STS", "LDSM", "STSM", "SHFL", "LDG", "STG", "LDL", "STL", "LDGSTS", "SYNCS"),
    FREE: ("BRA", "NOP", "BSYNC", "BSSY", "WARPSYNC", "WARPGROUP", "EXIT", "BAR", "DEPBAR", "LDGDEPBAR", "CS2R", "R2UR",
           "LDC", "@!PT"),
}  # fmt: skip
PIPES = {kind: pipe for pipe, kinds in KINDS.items() for kind in kinds}
OPERANDS = int(LATENCIES["operands"].cycles)
# By how many cycles a warp starts after the one before. That decides which of a few rhythms the warps fall into, so the
# mean counts.
STARTS = range(0, 8 * 37, 37)


def pipe(instruction: Instruction) -> str:
    """The pipe that it takes; what is not listed counts as integer arithmetic, and in uniform registers as nothing."""
    kind = instruction.kind
    return PIPES.get(kind, FREE if kind.startswith("U") else "ALU")


def interval(instruction: Instruction) -> int:
    """For how many cycles it keeps its pipe from others: whole ones, as instructions issue at such."""
    where, amount = pipe(instruction), 1
    if where == FREE:
        return 0
    if where == "wgmma":
        amount = columns(instruction)
    elif where == "shared" and instruction.kind != "SHFL":
        amount = instruction.bytes // 4
    return math.ceil(amount * INTERVALS[where].cycles)


def columns(wgmma: Instruction) -> int:
    """N of m64nNk8."""
    return int(re.search(r"x(\d+)x", wgmma.name)[1])  # type: ignore[index]


def latency(instruction: Instruction, load: Constant) -> int:
    """Until the scoreboard of its result is clear."""
    kind = instruction.kind
    if kind in ("LDG", "LDGSTS"):
        return int(load.cycles)
    wide = f"{kind}.{8 * instruction.bytes}"
    return int(LATENCIES.get(wide, LATENCIES.get(kind, LATENCIES["others"])).cycles)


def busy(code: Code) -> dict[str, int]:
    """For how many cycles a round of the loop keeps each pipe of a scheduler busy, for each warp."""
    total = dict.fromkeys(INTERVALS, 0)
    for instruction in code:
        if pipe(instruction) != FREE:
            total[pipe(instruction)] += interval(instruction)
    return {name: count for name, count in total.items() if count}


def cycles(code: Code, warps: int, load: Constant) -> float:
    """Of a round of the loop for each warp, in the long run; a load from global memory takes `load`."""
    runs = [Scheduler(code, warps, load, start).long_run() for start in (STARTS if warps > 1 else [0])]
    return sum(runs) / len(runs)


class Step(NamedTuple):
    """An instruction, with what the model knows of it."""

    kind: str
    control: Control
    pipe: str  # that it waits for
    interval: int
    latency: int
    columns: int  # of a product by wgmma
    commits: str  # the name of the group of copies or products that it ends
    awaits: tuple[str, int] | None  # a name of groups, and how many of the latest may be on their way

    @classmethod
    def of(cls, i: Instruction, load: Constant) -> "Step":
        """Of an instruction that was printed with its encoding."""
        assert i.control is not None, f"printed without its encoding: {i.name}"
        n, commits, awaits = 0, "", None
        if i.kind == "LDGDEPBAR":
            commits = f"SB{i.control.writes}"
        elif "DEPBAR" in i.name:
            name, left = i.operands.split(",")
            awaits = name, int(left, 16)
        elif i.kind == "HGMMA":
            n, commits = columns(i), "gsb0" if "gsb0" in i.operands else ""
        waits_for = FREE if n else pipe(i)
        return cls(i.kind, i.control, waits_for, interval(i), latency(i, load), n, commits, awaits)


class Warp:
    """Where a warp is in the loop, and when it can go on."""

    def __init__(self, start: int) -> None:
        self.place = 0
        self.ready = start  # when its next instruction can issue, if its pipe is free
        self.boards = [0] * len(SCOREBOARDS)  # when they are clear
        self.landed = 0  # when all copies into shared memory are there that it has asked for
        self.groups: dict[str, list[int]] = collections.defaultdict(list)  # when they are done, in their order

    def state(self, now: int) -> tuple:
        """What decides how it goes on."""
        times = (self.ready, self.landed, *self.boards)
        groups = (tuple(time - now for time in group if time > now) for group in self.groups.values())
        return (self.place, *(max(time - now, 0) for time in times), *groups)


class Scheduler:
    """Some warps that play a loop."""

    def __init__(self, code: Code, warps: int, load: Constant, start: int) -> None:
        self.steps = [Step.of(instruction, load) for instruction in code]
        self.warps = [Warp(start * n) for n in range(warps)]  # the one that issued last comes first
        self.free = dict.fromkeys([*INTERVALS, FREE], 0)  # when pipes are
        self.now = self.rounds = 0

    def long_run(self) -> float:
        """Cycles of a round for each warp, once everything stands as it has stood before."""
        seen: dict[tuple, tuple[int, int]] = {}
        while (state := self.state()) not in seen:
            seen[state] = self.now, self.rounds
            rounds = self.rounds
            while self.rounds == rounds:
                self.issue()
        now, rounds = seen[state]
        return (self.now - now) * len(self.warps) / (self.rounds - rounds)

    def state(self) -> tuple:
        """What decides how it goes on."""
        warps = (warp.state(self.now) for warp in self.warps)
        return (*warps, *(max(time - self.now, 0) for time in self.free.values()))

    def issue(self) -> None:
        """The next instruction of the first warp in turn that can, as soon as any can."""
        warp = self.able()
        if warp is None:
            self.now = min(max(warp.ready, self.free[self.steps[warp.place].pipe]) for warp in self.warps)
            warp = self.able()
        assert warp is not None
        self.play(warp)
        self.now += 1

    def able(self) -> Warp | None:
        """The first warp in turn that can issue now; it then is the one that issued last."""
        now, free, steps = self.now, self.free, self.steps
        for n, warp in enumerate(self.warps):
            if warp.ready <= now and free[steps[warp.place].pipe] <= now:
                if n:
                    self.warps = self.warps[n:] + self.warps[:n]
                return warp
        return None

    def play(self, warp: Warp) -> None:
        """Issue a warp's next instruction now."""
        now, boards = self.now, warp.boards
        step = self.steps[warp.place]
        done = now + step.latency
        if step.columns:
            done = self.multiply(step)
        elif step.interval:
            self.free[step.pipe] = now + step.interval
        if step.kind == "LDGSTS":
            warp.landed = max(warp.landed, done)
        elif step.kind == "LDGDEPBAR":
            done = warp.landed
        if step.commits:
            warp.groups[step.commits].append(done)
        _, reads, writes, stall = step.control
        if writes is not None and boards[writes] < done:
            boards[writes] = done
        if reads is not None and boards[reads] < now + OPERANDS:
            boards[reads] = now + OPERANDS
        warp.place += 1
        if warp.place == len(self.steps):
            warp.place = 0
            self.rounds += 1
        warp.ready = self.ready(warp, now + (stall or 1))

    def multiply(self, step: Step) -> int:
        """When a product of wgmma is done: the warp goes on at once, and the tensor cores take it up in its turn. They
        read 32 bytes a column from shared memory, for all four schedulers together."""
        self.free["wgmma"] = max(self.free["wgmma"], self.now) + step.interval
        self.free["shared"] = max(self.free["shared"], self.now) + step.columns // 4
        return self.free["wgmma"] + step.latency

    def ready(self, warp: Warp, time: int) -> int:
        """When all is there that a warp's next instruction waits for, at `time` at the earliest."""
        step, boards = self.steps[warp.place], warp.boards
        for board in step.control.waits:
            if boards[board] > time:
                time = boards[board]
        if step.awaits:
            name, left = step.awaits
            if len(warp.groups[name]) > left:
                time = max(time, warp.groups[name][-1 - left])
        return time
