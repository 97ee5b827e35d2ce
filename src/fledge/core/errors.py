"""One error for everything a user can put right: where it is, what was found, what is allowed, what to do.

A `FledgeError` is shown without a traceback. Anything else that reaches the screen is a bug of ours.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fledge.core.language import t


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in the order in which a reader needs it."""

    what: str
    where: str = ""  # "recipes/hatch.yaml:12 (stages.base.model.size)", "data.jsonl:17"
    found: str = ""
    allowed: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.found:
            lines.append("  " + t("found: {value}", value=self.found))
        if self.allowed:
            lines.append("  " + t("allowed: {value}", value=self.allowed))
        if self.fix:
            lines.append("  → " + self.fix)
        return "\n".join(lines)


class FledgeError(Exception):
    """Wrong input of any kind. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(Problem(p) if isinstance(p, str) else p for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    def __reduce__(self) -> tuple[type[FledgeError], tuple[Problem, ...]]:
        return type(self), self.problems


class StageFailed(FledgeError):
    """A stage ended with an error of its own; the traceback is in its log."""

    exit_code = 1


class Interrupted(FledgeError):
    """The user stopped the run (Ctrl-C, SIGTERM); everything needed to go on is on disk."""

    exit_code = 130


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`did you mean "response"?`, or nothing when no allowed word is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return t('did you mean "{word}"?', word=near[0]) if near else ""


def missing_extra(package: str, extra: str) -> FledgeError:
    """The error for an optional library that is not installed."""
    return FledgeError(
        Problem(
            t("{package} is not installed", package=package),
            fix=t("run: pip install 'fledge-llm[{extra}]'", extra=extra),
        )
    )


def need(module: str, extra: str, package: str = "") -> Any:
    """The module of an optional library; a FledgeError says which extra brings it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise missing_extra(package or module.partition(".")[0], extra) from None


def listing(words: Sequence[str], limit: int = 12) -> str:
    """`a, b, c, …` for messages."""
    return ", ".join(words[:limit]) + (", …" if len(words) > limit else "")
