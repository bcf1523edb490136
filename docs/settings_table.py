"""The table of settings in docs/train.md, from fastcaps.train.settings.

``python docs/settings_table.py`` writes it; a test says where it is not current.
"""

import dataclasses
from pathlib import Path

from fastcaps.train.settings import Settings, kind_of, option

PAGE = Path(__file__).parent / "train.md"
BEGIN, END = "<!-- written by docs/settings_table.py -->\n", "<!-- end -->\n"
WORDS = {bool: "", int: "integer", float: "number", str: "text"}


def table() -> str:
    """A row for each setting."""
    lines = ["| option | value | default | what it is |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(Settings):
        name, kind = option(field.name), kind_of(field)
        if kind is bool:
            name += f"`, `--no-{option(field.name)[2:]}"
        choices = field.metadata["choices"]
        value = ", ".join(f"`{choice}`" for choice in choices) if choices else WORDS[kind]
        default = "" if field.default in (None, "") else f"`{str(field.default).lower()}`"
        lines.append(f"| `{name}` | {value} | {default} | {field.metadata['help']} |")
    return "\n".join(lines) + "\n"


def current() -> str:
    """The page with the table as it should be."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(current())
