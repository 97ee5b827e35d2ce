"""Token ids become text as they come: never half a character, never the beginning of a stop string.

A Chinese character or an emoji may be split over several tokens, and a stop string may begin in one token and end
three tokens later. What cannot be told yet is held back until it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

HALF = "\ufffd"


class Decoder(Protocol):
    """A `tokenizers.Tokenizer`, as far as it is needed here."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """The text of one growing answer. Control tokens have no text."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._ids: list[int] = []
        self._start = 0  # ids before this no longer influence the text that is to come
        self._done = 0  # the text of the ids before this has been given out

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain now that `ids` have come."""
        self._ids.extend(ids)
        text = self._new_text()
        if text.endswith(HALF):  # most likely a character's first bytes: wait for the rest
            return ""
        if text:  # else (a control token) the stretch before stays the one that new text is decoded with
            self._start = self._done
        self._done = len(self._ids)
        return text

    def flush(self) -> str:
        """What was held back and will not be completed (bytes that make no character show as U+FFFD)."""
        text = self._new_text()
        self._start = self._done = len(self._ids)
        return text

    def _new_text(self) -> str:
        # Decoding from one settled stretch earlier keeps what a decoder does at the start of a text
        # (Metaspace drops the first space) away from the new part.
        before = self.decoder.decode(self._ids[self._start : self._done], skip_special_tokens=True)
        return self.decoder.decode(self._ids[self._start :], skip_special_tokens=True)[len(before) :]


class StopStrings:
    """Cuts a growing text at the first stop string; holds back what may yet turn out to be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def add(self, text: str) -> str:
        """The part of all text so far that is certain and has not been given out."""
        if not self.stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, now that no more text will come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins (shorter than `stop` itself)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
