"""Hooks of MkDocs: files of the repository that the site needs beside docs/, and references in docstrings."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
MIRRORED = ("CHANGELOG.md", "benchmarks/NOTES.md", "benchmarks/results/*.json")
LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)#]*")


def on_files(files: Files, config: Any) -> Files:
    """Add what is mirrored under its own path."""
    for pattern in MIRRORED:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Let links to files outside of docs/ lead to where the site has them."""
    folder = posixpath.dirname(page.file.src_uri)

    def in_site(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, match[0]))
        inside = path.startswith("docs/") or files.get_file_from_path(path) is None
        return match[0] if inside else posixpath.relpath(path, folder or ".")

    return LINK.sub(in_site, markdown)
