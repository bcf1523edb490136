"""What a check found."""

from dataclasses import dataclass

WRONG, SUSPICIOUS, FINE, UNKNOWN = "wrong", "suspicious", "fine", "not checked"


@dataclass(frozen=True)
class Finding:
    """One check of one place.

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
