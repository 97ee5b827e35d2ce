"""What engines in this process share: how they are asked, and how a request becomes a ticket."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.tokens.packing import plain
from fledge.inference.answer import Ticket
from fledge.inference.constraint import Constraints
from fledge.inference.engine import Delta, Listen, Request, Result
from fledge.inference.engines import blocking
from fledge.inference.prompt import check_prompt
from fledge.inference.working import Working
from fledge.records.chat import ChatRenderer


class Asking(Working):
    """An engine with a worker and a tokenizer of its own: it makes tickets of requests and hands them over."""

    context: int
    """the most tokens that a prompt and its answer may have together"""

    def __init__(
        self, tokenizer: Any, renderer: ChatRenderer | None, vocabulary: int, stop_ids: frozenset[int]
    ) -> None:
        """`vocabulary`: the ids that the model knows; `stop_ids`: those that end a text."""
        super().__init__()
        self.tokenizer, self.renderer = tokenizer, renderer
        self._vocabulary, self._stop_ids = vocabulary, stop_ids
        self._text = plain(tokenizer)  # never changed: threads may share it
        self._render_lock = threading.Lock()

    # ---- how it is asked

    def submit(self, request: Request, listen: Listen) -> Ticket:
        """Start a request. Raises FledgeError when its prompt is empty or leaves no room in the context."""
        ticket = self._ticket(request, listen)
        self._post([ticket])
        return ticket

    def stream(self, request: Request) -> Iterator[Delta]:
        """The deltas of a request as they come; closing the iterator cancels it."""
        return blocking.stream(self.submit, request)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """All answers, in order. All requests enter at once: on an idle engine the batches are always the same."""
        return blocking.generate(self._ticket, requests, self._post)

    def count(self, request: Request) -> int:
        """The tokens of a request's prompt. Raises what `submit` would raise."""
        return len(self._prompt(request))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: control spellings stay text, no special tokens are added."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; with `special` control tokens are spelled out, else left out."""
        return str(self._text.decode(list(ids), skip_special_tokens=not special))

    # ---- from a request to a ticket: engines add what is their own

    def _ticket(self, request: Request, listen: Listen) -> Ticket:
        """Raises FledgeError when the request cannot be."""
        prompt = self._prompt(request)
        stop_ids = self._stop_ids if request.stop_ids is None else frozenset(request.stop_ids)
        renderer = self._writing(request.adapter)
        if request.messages is not None and request.stop_ids is None and renderer is not None:
            stop_ids |= frozenset(renderer.stop_ids)
        room = self._room(len(prompt))
        limit = min(request.max_new_tokens or room, room)
        guide = self._constraints.guide(request.constraint, stop_ids) if request.constraint else None
        return Ticket(request, prompt, stop_ids, limit, self._text, listen, self._wake, guide)

    def _prompt(self, request: Request) -> list[int]:
        """The token ids of a request's prompt, seen to be ones that the model can go on from."""
        self._refuse(request)
        if request.messages is not None:
            prompt = self._rendered(request.messages, adapter=request.adapter)
        elif request.text is not None:
            prompt = list(self._text.encode(request.text).ids)
        else:
            prompt = list(request.prompt_ids or ())
        check_prompt(request, prompt, self._longest(), self._vocabulary)
        return prompt

    def _refuse(self, request: Request) -> None:
        """Raise FledgeError for what this engine does not do."""

    def _longest(self) -> int:
        """The most tokens of a prompt."""
        return self.context - 1

    def _room(self, prompt: int) -> int:
        """The most new tokens after a prompt of so many."""
        return self.context - prompt

    def _writing(self, adapter: str) -> ChatRenderer | None:
        """How chats are written for the adapter of that name."""
        return self.renderer

    def _rendered(self, messages: Sequence[Any], answer: bool = True, adapter: str = "") -> list[int]:
        """A conversation's token ids, with `answer` up to where an answer begins."""
        renderer = self._writing(adapter)
        if renderer is None:
            raise FledgeError(Problem(t("this model has no chat template"), fix=t("give it plain text instead")))
        with self._render_lock:
            return list(renderer.render(tuple(messages), add_generation_prompt=answer).ids)

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self._text.to_str())


def ids_of(*found: Any) -> frozenset[int]:
    """Token ids as tokenizers and generation configs name them: none, one or several."""
    flat = [id for item in found for id in (item if isinstance(item, (list, tuple)) else [item])]
    return frozenset(id for id in flat if id is not None)
