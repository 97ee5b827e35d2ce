"""What engines in this process share whose model another library computes: answers that come and go, round by round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError
from fledge.inference.answer import Answer, Ticket
from fledge.inference.asking import Asking, ids_of
from fledge.inference.engine import Request, Scored
from fledge.inference.engines.errors import Failed, cannot
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

        tokenizer = load_tokenizer(folder)
        renderer = ChatRenderer(tokenizer) if tokenizer.chat_template else None
        super().__init__(tokenizer, renderer, vocabulary, _stop_ids(folder, tokenizer))
        self.name, self.context = name, context
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._entering: list[Answer] = []  # who waited until the round that is being computed

    @abstractmethod
    def refused(self, request: Request) -> list[str]:
        """The fields of a request that ask for what the library does not do."""

    @abstractmethod
    def _advance(self, news: list[Answer]) -> None:
        """Take newcomers in and carry all answers a little further; who is finished leaves `self._running`."""

    @abstractmethod
    def _clear(self) -> None:
        """Forget all answers: what computed them has broken."""

    def _refuse(self, request: Request) -> None:
        for field in self.refused(request):
            raise cannot(self.name, field, self.instead, field)

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

    def _busy(self) -> bool:
        return bool(self._waiting or self._running)

    def _tickets(self) -> Iterable[Ticket]:
        return dict.fromkeys(answer.ticket for answer in [*self._running, *self._waiting])

    def _enter(self, ticket: Ticket) -> None:
        self._waiting.extend(ticket.answers)

    def _round(self) -> None:
        room = min(self.most - len(self._running), len(self._waiting))
        self._entering = [self._waiting.popleft() for _ in range(room)]
        for answer in [*self._entering, *self._running]:
            if answer.ticket.cancelled:
                answer.ticket.end()
        self._advance([answer for answer in self._entering if not answer.finished])

    def _broken(self, error: FledgeError) -> None:
        for answer in [*self._running, *self._entering]:
            answer.ticket.fail(Failed(*error.problems))
        self._clear()


def _stop_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The token ids that end a text: what the tokenizer and the generation config call end of sequence."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    ends = GenerationConfig.from_pretrained(folder).eos_token_id if file.is_file() else None
    return ids_of(tokenizer.eos_token_id, ends)
