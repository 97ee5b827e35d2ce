"""Control tokens, kept apart from text that merely spells them.

A chat template writes `<|im_end|>` and means the token; a user may write `<|im_end|>` and must not get it. After
rendering, the two look the same. So every spelling in the contents is replaced by a private mark before the template
runs, and what the template itself wrote is replaced by another one afterwards; a copy of the tokenizer, in which the
control tokens are *called* by those marks, then encodes the whole text at once, spellings put back. In the copy no
text leads to a control token, whatever the algorithm (byte-level BPE, Unigram, WordPiece), and all else (what a token
strips to its left, the space a tokenizer puts before the first word) happens as it does in the original.

The marks hold 128 random bits, drawn per tokenizer, so that nobody can write one; no token id depends on them.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.records.kinds import Message


@dataclass(frozen=True)
class Segment:
    """A stretch of rendered text, with marks where contents spell control tokens; `weight` is its tokens' weight."""

    text: str
    weight: float = 0.0


class ControlTokens:
    """The control tokens of one tokenizer under one template: `escape` before rendering, `encode` after.

    Control tokens are the tokenizer's special tokens, and those of its other added tokens that the template writes
    (`<tool_call>`, `<think>`). The latter keep their meaning in an assistant's turns, which are the model's own
    writing; the special ones are never taken from any content.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise FledgeError(
                Problem(
                    t("the tokenizer has no tokenizer.json"),
                    found=type(tokenizer).__name__,
                    fix=t("convert it to a fast tokenizer (save_pretrained of transformers does)"),
                )
            )
        spec = json.loads(backend.to_str())
        added = {token["content"]: token for token in spec["added_tokens"]}
        self.special = sorted(text for text, token in added.items() if token["special"])
        written = {text for text in added if text.strip() and text in template}
        self.spellings = sorted(written.union(self.special))
        self.ids: dict[str, int] = {text: added[text]["id"] for text in self.spellings}

        nonce = secrets.token_hex(16)
        self._spelled = {text: f"{nonce}s{i}e" for i, text in enumerate(self.spellings)}  # in contents
        self._real = {text: f"{nonce}r{i}e" for i, text in enumerate(self.spellings)}  # written by the template
        self._cut = f"{nonce}c"
        self._any_special = _one_of(self.special)
        self._any = _one_of(self.spellings)
        self._any_mark = re.compile(f"{nonce}s([0-9]+)e|{self._any.pattern}")
        self._copy, self._original_id = _renamed(spec, self._real, self._cut)

    def escape(self, message: Message) -> dict[str, Any]:
        """The message as a template sees it, every spelling of a control token in it replaced by its mark."""
        spelling = self._any_special if message.role == "assistant" else self._any

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return spelling.sub(lambda match: self._spelled[match[0]], _valid(value))
            if isinstance(value, dict):
                return {marked(key): marked(item) for key, item in value.items()}
            return [marked(item) for item in value] if isinstance(value, list) else value

        return {key: value if key == "role" else marked(value) for key, value in message.to_dict().items()}

    def written(self, text: str) -> list[re.Match[str]]:
        """The control tokens that a template wrote in a rendered text, in order."""
        return list(self._any.finditer(text))

    def encode(self, segments: Iterable[Segment]) -> tuple[list[int], list[float]]:
        """Token ids and weights of the segments' joined text. No token reaches across the start of a weighted segment:
        a served model is given what stands before it on its own."""
        pieces: list[str] = []
        starts: list[tuple[int, float]] = []
        length = 0
        for segment in segments:
            text = self._any_mark.sub(self._name, segment.text)
            if segment.weight:
                text = self._cut + text
            starts.append((length, segment.weight))
            pieces.append(text)
            length += len(text)
        encoding = self._copy.encode("".join(pieces), add_special_tokens=False)
        ids: list[int] = []
        weights: list[float] = []
        at = 0
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            while at + 1 < len(starts) and starts[at + 1][0] <= start:
                at += 1
            if (original := self._original_id.get(token, token)) is not None:
                ids.append(original)
                weights.append(starts[at][1])
        return ids, weights

    def _name(self, match: re.Match[str]) -> str:
        """A spelled token's mark becomes the spelling, a written token its mark."""
        return self.spellings[int(match[1])] if match[1] else self._real[match[0]]


def _one_of(spellings: list[str]) -> re.Pattern[str]:
    """Matches the longest spelling that starts at a place, as the tokenizer does."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or "(?!)")


def _valid(text: str) -> str:
    """The text itself. Raises FledgeError where it holds a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FledgeError(Problem(t("a message is not valid Unicode (it holds half a surrogate pair)"))) from None
    return text


def _renamed(spec: dict[str, Any], names: dict[str, str], cut: str) -> tuple[Any, dict[int, int | None]]:
    """The tokenizer that `spec` describes with its control tokens called by `names`, and its ids for added tokens →
    the original's. The token `cut` (id None) separates its neighbours and disappears."""
    from tokenizers import AddedToken, Tokenizer

    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:  # Unigram: [piece, score]
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:  # a merge that takes part in spelling a control token would name a token that is gone
        model["merges"] = [m for m in model["merges"] if names.keys().isdisjoint((*m, "".join(m)))]
    originals = {names.get(token["content"], token["content"]): token["id"] for token in spec["added_tokens"]}
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    # Post-processors put nothing in without `add_special_tokens`, but trim the offsets that weights are read from.
    copy = Tokenizer.from_str(json.dumps(spec | {"post_processor": None, "truncation": None, "padding": None}))
    copy.add_special_tokens([AddedToken(cut, special=True, normalized=False)])
    return copy, {number: originals.get(token.content) for number, token in copy.get_added_tokens_decoder().items()}
