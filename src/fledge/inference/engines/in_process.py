"""What engines in this process share whose model another library computes: rendering, tokens, tickets, the thread."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.tokens.packing import plain
from fledge.inference import asking
from fledge.inference.answer import Answer, Ticket
from fledge.inference.asking import Asking
from fledge.inference.engine import Listen, PromptTooLong, Request, Scored
from fledge.inference.engines.errors import cannot
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Conversation


class InProcessEngine(Asking, ABC):
    """An `Engine` whose worker thread hands answers to a library and takes tokens from it, round by round."""

    most = 16
    """answers at once"""
    instead: Sequence[str] = ("native",)
    """engines that can what this one cannot"""

    def __init__(self, name: str, folder: Path, context: int, vocabulary: int) -> None:
        """`folder`: the model folder, for its tokenizer and chat template."""
        from fledge.models.load import load_tokenizer

        self.name, self.context, self._vocabulary = name, context, vocabulary
        self.tokenizer = tokenizer = load_tokenizer(folder)
        self.renderer = ChatRenderer(tokenizer) if tokenizer.chat_template else None
        self._text = plain(tokenizer)  # never changed: threads may share it
        self._stop_ids = _stop_ids(folder, tokenizer)
        self._render_lock = threading.Lock()
        self._inbox: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._open()

    @abstractmethod
    def refused(self, request: Request) -> list[str]:
        """The fields of a request that ask for what the library does not do."""

    @abstractmethod
    def _round(self, news: list[Answer]) -> None:
        """Take newcomers in and carry all answers a little further; who is finished leaves `self._running`."""

    # ---- requests

    def count(self, request: Request) -> int:
        """The tokens of a request's prompt. Raises what `submit` would raise."""
        return len(self._prompt(request))

    def _ticket(self, request: Request, listen: Listen) -> Ticket:  # type: ignore[override]
        prompt = self._prompt(request)
        stop_ids = self._stop_ids if request.stop_ids is None else frozenset(request.stop_ids)
        if request.messages is not None and request.stop_ids is None and self.renderer is not None:
            stop_ids |= frozenset(self.renderer.stop_ids)
        room = self.context - len(prompt)
        limit = min(request.max_new_tokens or room, room)
        return Ticket(request, prompt, stop_ids, limit, self._text, listen, self._wake)

    def _prompt(self, request: Request) -> list[int]:
        for field in self.refused(request):
            raise cannot(self.name, field, self.instead, field)
        if request.messages is not None:
            if self.renderer is None:
                raise FledgeError(Problem(t("this model has no chat template"), fix=t("give it plain text instead")))
            with self._render_lock:
                prompt = list(self.renderer.render(tuple(request.messages), add_generation_prompt=True).ids)
        elif request.text is not None:
            prompt = list(self._text.encode(request.text).ids)
        else:
            prompt = list(request.prompt_ids or ())
        if not prompt:
            raise FledgeError(Problem(t("the prompt is empty"), "prompt"))
        self._check(prompt, self.context - 1)
        return prompt

    def _check(self, ids: Sequence[int], most: int) -> None:
        if len(ids) > most:
            found, allowed = t("{n} tokens", n=len(ids)), t("at most {n} tokens", n=most)
            raise PromptTooLong(
                Problem(t("the prompt is longer than the model's context"), "prompt", found=found, allowed=allowed)
            )
        worst = max(ids) if min(ids) >= 0 else min(ids)
        if not 0 <= worst < self._vocabulary:
            allowed = f"0 … {self._vocabulary - 1}"
            raise FledgeError(Problem(t("a token id is outside the vocabulary"), "prompt", str(worst), allowed))

    # ---- probabilities, rewards, vectors

    def score(self, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]]) -> list[Scored]:
        """Raises CannotDo where the library shows no probabilities."""
        raise cannot(self.name, "score", self.instead)

    def reward(self, conversations: Sequence[Conversation]) -> list[float]:
        """Only the native engine has reward models: raises CannotDo."""
        raise cannot(self.name, "reward", ["native"])

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Raises CannotDo where the library shows no hidden states."""
        raise cannot(self.name, "embed", self.instead)

    # ---- the worker

    def _post(self, tickets: list[Ticket]) -> None:  # type: ignore[override]
        with self._news:
            self._see_worker()
            self._inbox.extend(answer for ticket in tickets for answer in ticket.answers)
            self._news.notify()

    def _wake(self) -> None:
        with self._news:
            self._news.notify()

    def _work(self) -> None:
        while True:
            with self._news:
                if not self._news.wait_for(lambda: self._closed or self._inbox or self._running, asking.LINGER):
                    self._worker = None
                    return
                if self._closed:
                    break
                room = self.most - len(self._running)
                news = [self._inbox.popleft() for _ in range(min(room, len(self._inbox)))]
            for answer in [*news, *self._running]:
                if answer.ticket.cancelled and not answer.finished:
                    answer.cancel()
            self._round([answer for answer in news if not answer.finished])
        for answer in [*self._running, *self._inbox]:
            if not answer.finished:
                answer.cancel()


def _stop_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The token ids that end a text: what the tokenizer and the generation config call end of sequence."""
    from transformers import GenerationConfig

    found = [tokenizer.eos_token_id]
    if (folder / "generation_config.json").is_file():
        found.append(GenerationConfig.from_pretrained(folder).eos_token_id)
    flat = [id for item in found for id in (item if isinstance(item, (list, tuple)) else [item])]
    return frozenset(id for id in flat if id is not None)
