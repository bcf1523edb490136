"""Findings: what the checks are called, what they can conclude, and what one found."""

from dataclasses import dataclass

WRONG, SUSPICIOUS, FINE, UNKNOWN = "wrong", "suspicious", "fine", "not checked"

# The names of the checks.
RUNS = "it runs"
FINITE = "the output is finite"
ROUTING = "routing"
KEPT_STATE = "calls are independent"
BATCH_MATES = "samples are independent"
SOFTMAX_AXIS = "softmax over the output capsules"
ITERATIONS = "number of iterations"
AGREEMENT = "one coupling for each pair of capsules"
SQUASH_AXIS = "squash over a pose"
DISTINCT = "output capsules differ"
INPUT_SQUASH = "squash of the input poses"
SCRAMBLING = "capsules keep their place"
ZERO_CAPSULES = "zero capsules"
INITIALISATION = "it trains from here"
CLASS_SCORES = "class scores are lengths"
MARGIN_LOSS = "margin loss"
RECONSTRUCTION_LOSS = "reconstruction loss"


@dataclass(frozen=True)
class Finding:
    """What one check of one module found.

    Attributes:
        check: what was looked at.
        where: the path of the module; empty for the model itself.
        verdict: ``"wrong"``, ``"suspicious"``, ``"fine"`` or ``"not checked"``.
        evidence: what was computed.
        fix: what to do, or an empty string.
    """

    check: str
    where: str
    verdict: str
    evidence: str
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"{self.verdict.upper():<11} {self.check}, {self.where or 'the model'}: {self.evidence}"]
        return "\n".join([*lines, *([f"{'':<11} fix: {self.fix}"] if self.fix else [])])
