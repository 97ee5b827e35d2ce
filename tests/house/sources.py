"""The project's own files, as the tests of the house see them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fledge"


def modules() -> list[Path]:
    """Every Python file of the package, sorted."""
    return sorted(SOURCE.rglob("*.py"))


def nodes(file: Path) -> Iterator[ast.AST]:
    """Every node of a file's syntax tree."""
    return ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file)))


def place(file: Path, line: int) -> str:
    """`src/fledge/core/errors.py:12`."""
    return f"{file.relative_to(ROOT)}:{line}"
