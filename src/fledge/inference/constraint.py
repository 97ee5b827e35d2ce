"""Answers that must be JSON, JSON of a schema, a match of a regular expression, or a word of a grammar.

`llguidance` follows the grammar byte by byte and says which tokens may come next; a character of several tokens is
allowed token by token. Stop tokens are ours: they are allowed where the text so far is complete, and an answer that
nothing could follow ends without one. Compiled once per constraint; an answer's `Guide` is a copy of what was
compiled.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engine import Constraint

_KEPT = 64
"""compiled constraints that are remembered"""
_SPACE = r" |\n[ \t]{0,16}"
"""white space between the tokens of JSON: enough for an indented line, too little to go on for ever"""


class Constraints:
    """The constraints of one tokenizer, compiled. May be used from any thread."""

    def __init__(self, tokenizer_json: str) -> None:
        """`tokenizer_json`: a `tokenizers.Tokenizer` as text.

        Raises FledgeError when `llguidance` does not know this kind of tokenizer.
        """
        import llguidance

        self._library = llguidance
        self.end, tokenizer_json = _end_of_text(tokenizer_json)
        try:
            self._tokens = llguidance.LLTokenizer(tokenizer_json, eos_token=self.end)
        except Exception as error:
            problem = Problem(t("answers of this tokenizer cannot be constrained"), "constraint", found=str(error))
            raise FledgeError(problem) from None
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()
        self._lock = threading.Lock()

    def guide(self, constraint: Constraint, stop_ids: frozenset[int]) -> Guide:
        """The guide of a new answer. Raises FledgeError, which says where, when the constraint cannot be used."""
        with self._lock:
            matcher = self._compiled.get(constraint)
            if matcher is None:
                matcher = self._compiled[constraint] = self._compile(constraint)
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(constraint)
            return Guide(matcher.deep_copy(), self.end, stop_ids)

    def _compile(self, constraint: Constraint) -> Any:
        matcher = self._library.LLMatcher(self._tokens, self._grammar(constraint), log_level=0)
        if matcher.is_error():
            raise _refusal(constraint, matcher.get_error())
        return matcher

    def _grammar(self, constraint: Constraint) -> str:
        make = self._library.LLMatcher
        if constraint.kind == "regex":
            return str(make.grammar_from_regex(constraint.value))
        if constraint.kind == "grammar":
            return str(make.grammar_from_lark(constraint.value))
        schema: Any = {}
        if constraint.kind == "json_schema":
            try:
                schema = json.loads(constraint.value)
            except json.JSONDecodeError as error:
                found = t(
                    "line {line}, column {column}: {message}", line=error.lineno, column=error.colno, message=error.msg
                )
                raise _refusal(constraint, found) from None
            if not isinstance(schema, (dict, bool)):
                raise _refusal(constraint, type(schema).__name__)
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        try:
            return str(make.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": _SPACE}))
        except ValueError as error:
            raise _refusal(constraint, str(error)) from None


class Guide:
    """Which tokens one answer may go on with."""

    def __init__(self, matcher: Any, end: int, stop_ids: frozenset[int]) -> None:
        """`end`: the token by which the matcher says that the text may end."""
        self._matcher, self._end, self._stop_ids = matcher, end, stop_ids
        self._bits: NDArray[np.bool_] | None = None

    @property
    def accepting(self) -> bool:
        """Whether the text so far satisfies the constraint: the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def complete(self) -> bool:
        """Whether it does, and nothing may follow: the answer has to end here."""
        return self.accepting and bool(self._matcher.is_stopped() or not self._allowed().any())

    def mask(self, row: NDArray[Any]) -> None:
        """Set what may not come next to -inf in one row of logits (V,). Raises FledgeError at a dead end."""
        allowed = np.zeros(len(row), bool)
        known = self._allowed()[: len(row)]  # a model may have more columns than its tokenizer tokens, or fewer
        allowed[: len(known)] = known
        if self.accepting:
            allowed[[id for id in self._stop_ids if 0 <= id < len(row)]] = True
        if not allowed.any():
            found = self._matcher.get_error().partition("<state>")[0].strip()
            raise FledgeError(Problem(t("no token can go on as the constraint demands"), "constraint", found=found))
        row[~allowed] = -np.inf

    def _allowed(self) -> NDArray[np.bool_]:
        """For every token whether the text may go on with it."""
        if self._bits is None:
            packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._bits = np.unpackbits(packed, bitorder="little").astype(bool)
            self._bits[self._end] = False
        return self._bits

    def took(self, token: int) -> None:
        """The answer gained a token."""
        if token not in self._stop_ids:
            self._matcher.consume_token(token)
            self._bits = None

    def valid(self, ids: Sequence[int]) -> int:
        """How many of some tokens could follow, one after the other."""
        return int(self._matcher.validate_tokens(list(ids))) if ids else 0

    def forced(self) -> list[int]:
        """Tokens that spell what must follow: the punctuation and the keys of a schema."""
        return [] if self.accepting else list(self._matcher.compute_ff_tokens())

    def fork(self) -> Guide:
        """A guide that goes on from here by itself."""
        return Guide(self._matcher.deep_copy(), self._end, self._stop_ids)


def _refusal(constraint: Constraint, found: str) -> FledgeError:
    what = {
        "json": t("JSON cannot be demanded of this model"),
        "json_schema": t("the JSON schema cannot be used"),
        "regex": t("the regular expression cannot be used"),
        "grammar": t("the grammar cannot be used"),
    }[constraint.kind]
    return FledgeError(Problem(what, "constraint", found=found.strip()[:600]))


def _end_of_text(tokenizer_json: str) -> tuple[int, str]:
    """A token by which the matcher may say that a text is over, and the tokenizer that has it.

    Which one is all the same: what stops an answer is up to its request.
    """
    tokenizer = json.loads(tokenizer_json)
    added = tokenizer.setdefault("added_tokens", [])
    for token in added:
        if token["special"]:
            return int(token["id"]), tokenizer_json
    end = len(tokenizer["model"].get("vocab", ())) + len(added)
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.append({"id": end, "content": "<|end|>", "special": True, **plain})
    return end, json.dumps(tokenizer)
