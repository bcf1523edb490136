"""Launch parameters of the Triton kernels: from a table of measurements, or by a heuristic."""

import functools
import math
from pathlib import Path
from typing import NamedTuple

from fastcaps._reading import read_json

BB = 16  # samples of a tile: the rows of a tensor-core instruction
REGISTERS = 160  # per thread, for the tensors that live through the loop over the input capsules
TUNED = Path(__file__).with_name("tuned.json")  # {GPU: {key: parameters}}, by `fastcaps tune`


class Parameters(NamedTuple):
    """Of ``sweep`` and ``gradients``: JG x JT output capsules in a tile, K entries of D_in at a time, and how many
    warps a multiprocessor is given."""

    JG: int
    JT: int
    K: int
    num_warps: int
    num_stages: int = 2
    warps_per_multiprocessor: int = 8


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _tile(J: int, most_JT: int, most_JG: int) -> tuple[int, int]:
    """JG and JT with the fewest tiles, then the fewest groups, then no more capsules than needed."""
    JG = 1
    while most_JG >= 2 * JG and JG * most_JT < J:
        JG *= 2
    return JG, math.ceil(J / (JG * math.ceil(J / (JG * most_JT))))


def sweep_parameters(J: int, D_in: int, D: int, votes: bool, tensors: int, itemsize: int) -> Parameters:
    """As many output capsules as the registers hold.

    Args:
        J: output capsules.
        D_in: entries of a pose.
        D: entries of what is summed, rounded up to a power of two.
        votes: whether these are given, or poses stand for them.
        tensors: how many there are of their size: sums, votes, V (but for the first uniform sum), ds in the backward.
        itemsize: of poses and weight, in bytes.
    """
    if votes:  # no matrix product that wants its own layout: all warps share a tensor
        num_warps = 4 if D <= 128 else 8
        most = max(1, REGISTERS * 32 * num_warps // (tensors * BB * D))
        JG, JT = _tile(J, min(most, 8), max(1, most // 8))
        return Parameters(JG, JT, 16, num_warps)
    wide = max(1, D // 64)  # warps that share the entries of a vote
    K = min(power_of_2(max(D_in, 16)), 128 // itemsize, 512 // wide)
    registers = REGISTERS - (K - 16) * itemsize // 4  # the poses, and their lo parts
    most = max(1, registers * 32 * wide // (tensors * BB * D))
    JG, JT = _tile(J, most, 8 if wide == 1 else 1)
    if tensors == 4 and JG * JT < J and JT > 4:  # a loop over tiles needs some registers
        JG, JT = _tile(J, 4, JG)
    while K > 16 and JG * JT * K * D * itemsize > 48 * 1024:  # shared memory of a stage
        K //= 2
    return Parameters(JG, JT, K, JG * wide)


def gradients_parameters(J: int, D_in: int, D: int, votes: bool, T: int) -> Parameters:
    """As many output capsules as shared memory (V, ds of all iterations) and registers (the matrices' gradients) hold.

    The arguments are those of :func:`sweep_parameters`, and T, the iterations.
    """
    if votes:
        return Parameters(1, min(J, 4 if D <= 64 else 1), 16, 4 if D <= 128 else 8)
    wide = max(1, D // 64)
    K = max(16, min(power_of_2(D_in), 32, 1024 // D))
    T = min(T, 5)  # more of them are not in flight at the same time
    capsule = (2 * T - 1) * BB * D * 4 + 2 * D * K * 4  # bytes of shared memory
    spills_beyond = 1 if D >= 32 else 5 if J <= 10 else 3  # as the compiler's reports say
    most = max(1, min(spills_beyond, 64 * 32 * wide // (D * K), 40 * 1024 * wide // capsule))
    groups = 1
    while wide == 1 and groups < 2 and 2 * groups * most * capsule <= 80 * 1024:
        groups *= 2
    JG, JT = _tile(J, most, groups)
    return Parameters(JG, JT, K, JG * wide, num_stages=2 if JG * JT * capsule <= 80 * 1024 else 1)


@functools.cache
def tuned(gpu: str) -> dict[str, Parameters]:
    """The table of a GPU, by ``Call.key``; empty where nobody has tuned for it.

    Raises:
        ValueError: the file is damaged.
    """
    table = read_json(TUNED) if TUNED.exists() else {}
    try:
        return {key: Parameters(**value) for key, value in table.get(gpu, {}).items()}
    except (AttributeError, TypeError) as error:  # no object, or of other parameters
        raise ValueError(f"{TUNED} is not what fastcaps tune writes: {error}") from error
