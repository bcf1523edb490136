"""Griffe extension: the docstrings' roles of Sphinx, formulas and examples in the forms that Griffe knows."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):`~?([^`]+)`")
INLINE = re.compile(r":math:`([^`]+)`")
BLOCK = re.compile(r"^\.\. math:: ?(.*(?:\n(?:[ ]+.*)?)*)", re.MULTILINE)


def formula(match: re.Match[str]) -> str:
    """The source of a formula, as a block of code."""
    lines = [line.strip() for line in match[1].splitlines() if line.strip()]
    return "\n".join(["```latex", *lines, "```", "", ""])


class Roles(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            text = BLOCK.sub(formula, obj.docstring.value)
            text = text.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = INLINE.sub(r"`\1`", ROLE.sub(r"`\1`", text))
