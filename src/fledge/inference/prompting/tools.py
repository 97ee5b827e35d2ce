"""What a model may use: a calculator, a search, Python in a sandbox. Any object with `name`, `describe` and a call."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.sandbox import Limits, run_python
from fledge.inference.prompting.numerals import plain, spelled
from fledge.inference.prompting.wordings import Language, say


class ToolError(Exception):
    """What the model did with a tool cannot be; the model is told and may try again."""


class Tool(Protocol):
    """Something that a model may use by writing `name[input]`."""

    @property
    def name(self) -> str:
        """How the model calls it."""

    def describe(self, language: Language) -> str:
        """What it does, in a line, with an example."""

    def __call__(self, given: str, language: Language) -> str:
        """The observation for an input. Raises ToolError with what the model is told,
        FledgeError where the tool itself cannot work: that ends the run."""


# --- the calculator ------------------------------------------------------------------------------------------------

Value = Fraction | float
_BITS = 4096
"""results of powers and factorials are no longer than this"""
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "sqrt": math.sqrt, "exp": math.exp, "log": math.log, "ln": math.log, "log2": math.log2, "log10": math.log10,
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "asin": math.asin, "acos": math.acos, "atan": math.atan,
    "abs": abs, "min": min, "max": max, "floor": math.floor, "ceil": math.ceil,
    "round": lambda x, n=0: round(x, _small(n)),
    "gcd": lambda a, b: math.gcd(_whole(a), _whole(b)), "lcm": lambda a, b: math.lcm(_whole(a), _whole(b)),
    "factorial": lambda n: _factorial(_whole(n)), "comb": lambda n, k: math.comb(_small(n), _small(k)),
    "perm": lambda n, k: math.perm(_small(n), _small(k)),
}  # fmt: skip
_CONSTANTS = {"pi": math.pi, "e": math.e, "π": math.pi}
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "【": "(", "】": ")"})


@dataclass(frozen=True)
class Calculator:
    """Arithmetic, exact as long as only + − × ÷ and whole powers are used; nothing of it is run as a program."""

    name: str = "calculator"

    def describe(self, language: Language) -> str:
        return say(language, "tools", "calculator")

    def __call__(self, given: str, language: Language) -> str:
        return calculate(given)


def calculate(expression: str) -> str:
    """The value of an expression as people write it: 3×(4+5)², 50%, 1,234÷2. Raises ToolError."""
    text = re.sub(r"(?<=[\d)])²", "**2", expression)
    text = re.sub(r"(?<=[\d)])³", "**3", text)
    text = plain(text).translate(_SPELLINGS).strip().rstrip("=?").strip()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))(?![^()]*\))", "", text)  # 1,234, but not min(1,234)
    text = re.sub(r"(\d+(?:\.\d+)?)\s*%(?!\s*[\w(.])", r"(\1/100)", text)
    if len(text) > 400:
        raise ToolError(t("the expression is too long"))
    try:
        value = _value(ast.parse(text, mode="eval").body, 0)
        return _written(value)
    except ToolError:
        raise
    except ZeroDivisionError:
        raise ToolError(t("division by zero")) from None
    except OverflowError:
        raise ToolError(t("the number is too large")) from None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ToolError(t("this is no expression that can be calculated: {text}", text=expression[:100])) from None


def _value(node: ast.expr, depth: int) -> Value:
    if depth > 60:
        raise ToolError(t("the expression is too long"))
    match node:
        case ast.Constant(value=bool()):
            raise TypeError(node)
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number)) if math.isfinite(number) else number
        case ast.Name(id=name) if name.lower() in _CONSTANTS:
            return _CONSTANTS[name.lower()]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, depth + 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner, depth + 1)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, depth + 1), _value(right, depth + 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _number(_BINARY[type(op)](_value(left, depth + 1), _value(right, depth + 1)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name.lower() in _FUNCTIONS:
            return _number(_FUNCTIONS[name.lower()](*(_value(arg, depth + 1) for arg in args)))
    raise TypeError(node)


def _number(value: Any) -> Value:
    if isinstance(value, complex):
        raise ValueError(value)
    value = Fraction(value) if isinstance(value, int) else value
    if isinstance(value, Fraction) and value.numerator.bit_length() + value.denominator.bit_length() > 2 * _BITS:
        raise OverflowError
    return value  # type: ignore[no-any-return]


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits > 1 and bits * abs(exponent.numerator) > _BITS:
            raise OverflowError
        return base**exponent.numerator
    return _number(float(base) ** float(exponent))


def _whole(value: Value) -> int:
    if value != int(value):
        raise ValueError(value)
    return int(value)


def _small(value: Value) -> int:
    number = _whole(value)
    if abs(number) > 400:
        raise OverflowError
    return number


def _factorial(number: int) -> int:
    return math.factorial(_small(Fraction(number)))


def _written(value: Value) -> str:
    if isinstance(value, Fraction):
        exact = spelled(value)
        return exact if "/" not in exact and len(exact) <= 400 else f"{float(value):.12g}"
    if not math.isfinite(value):
        raise OverflowError
    return spelled(Fraction(f"{value:.12g}")) if 1e-9 < abs(value) < 1e15 else f"{value:.12g}"


# --- search --------------------------------------------------------------------------------------------------------


class Searches(Protocol):
    """Whatever finds passages."""

    def search(self, query: str, k: int) -> Sequence[Any]:
        """The k best, best first: texts, or objects with `text` and, where they have one, `where`."""


@dataclass(frozen=True)
class Search:
    """Passages from a retriever, each with its place, so that an answer can name it."""

    retriever: Searches
    k: int = 3
    characters: int = 600
    """of a passage that the model is shown"""
    name: str = "search"

    def describe(self, language: Language) -> str:
        return say(language, "tools", "search")

    def __call__(self, given: str, language: Language) -> str:
        if not given.strip():
            raise ToolError(t("the query is empty"))
        found = self.retriever.search(given, self.k)
        rows = []
        for number, passage in enumerate(found, start=1):
            text = str(getattr(passage, "text", passage)).strip()
            where = str(getattr(passage, "where", "") or "")
            text = text if len(text) <= self.characters else text[: self.characters] + "…"
            rows.append(f"[{number}] " + (f"({where}) " if where else "") + " ".join(text.split()))
        return "\n".join(rows) or say(language, "tools", "nothing_found")


# --- Python --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Python:
    """Programs that the model writes, in the sandbox of `core.sandbox` and nowhere else."""

    limits: Limits = field(default_factory=Limits)
    characters: int = 2000
    """of a program's output that the model is shown"""
    name: str = "python"

    def describe(self, language: Language) -> str:
        return say(language, "tools", "python")

    def __call__(self, given: str, language: Language) -> str:
        ran = run_python(_code(given), self.limits)
        shown = ran.output.strip()
        if ran.status == "timeout":
            shown = f"{shown}\n{say(language, 'tools', 'timeout')}"
        elif ran.status == "error":
            last = ran.errors.strip().splitlines()[-1:] or ["?"]
            shown = f"{shown}\n{say(language, 'tools', 'failed', message=last[0])}"
        return shown.strip()[: self.characters] or say(language, "tools", "nothing_printed")


def _code(text: str) -> str:
    """What stands between ``` fences; without them the text itself."""
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return fenced[1] if fenced else text


def built_in() -> dict[str, Tool]:
    """The tools that need nothing."""
    return {"calculator": Calculator(), "python": Python()}


def tool_of(name: str, given: Mapping[str, Tool]) -> Tool:
    """The tool of that name: one that was given, else a built-in one. Raises FledgeError when there is none."""
    tools = {**built_in(), **given}
    if name not in tools:
        raise FledgeError(
            Problem(
                t('there is no tool "{name}" here', name=name),
                "tools",
                allowed=", ".join(sorted(tools)),
                fix=t("give the search an index to look in") if name == "search" else "",
            )
        )
    return tools[name]
