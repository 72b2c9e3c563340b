"""Statements that are kept in files of their own, where people can read and try them.

Owns the form of those files: `-- name: NAME` begins a statement, other comments are for readers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

BEGINNING = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def statements(file: str) -> Mapping[str, str]:
    """Name -> text, from a file beside this module."""
    _, *parts = BEGINNING.split(Path(__file__).with_name(file).read_text(encoding="utf-8"))
    return {name: without_comments(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def without_comments(text: str) -> str:
    return "\n".join(line for line in text.strip().splitlines() if not line.startswith("--")).strip()


def assignments(names: Iterable[str], mark: str) -> str:
    """`"a" = :a, "b" = :b`. The names are columns of ours, never what a caller said. `mark` is the driver's: `:{}`."""
    return ", ".join(f'"{name}" = {mark.format(name)}' for name in names)
