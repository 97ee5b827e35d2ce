"""An engine in this process around a graph that another library computes: the loop and the sampling are ours, so that
every option means what it means with the native engine.

Newcomers are read together, then all answers take one token a step; whoever is finished leaves at once.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.answer import Answer, Ticket
from fledge.inference.constraint import Constraints
from fledge.inference.engine import Listen, Request, Scored
from fledge.inference.engines.errors import Failed
from fledge.inference.engines.in_process import InProcessEngine
from fledge.inference.sampling import logprobs_of, sample

Floats = NDArray[np.float32]
log = logging.getLogger(__name__)

_REFUSED = (("beams", 1), ("best_of", None), ("prompt_logprobs", None), ("adapter", ""))


class Rows(ABC):
    """Sequences that a library computes side by side."""

    context: int
    vocabulary: int

    @abstractmethod
    def start(self, prompts: Sequence[Sequence[int]]) -> Floats:
        """Read prompts into new rows behind the others; the logits (B, V) after each."""

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> Floats:
        """Read one token into every row; the logits (B, V) after it."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these; they are numbered anew in this order."""

    @abstractmethod
    def logits(self, ids: Sequence[int], first: int) -> Floats:
        """Logits (T - first, V) of one sequence from column `first` on, without touching the rows. Any thread."""

    @abstractmethod
    def hidden(self, ids: Sequence[int]) -> Floats:
        """The last hidden states (T, D) of one sequence. Any thread."""


class LocalEngine(InProcessEngine):
    """An `Engine` over `Rows`."""

    def __init__(self, name: str, rows: Rows, folder: Path) -> None:
        super().__init__(name, folder, rows.context, rows.vocabulary)
        self._rows = rows
        self._constraints: Constraints | None = None

    def refused(self, request: Request) -> list[str]:
        return [field for field, neutral in _REFUSED if getattr(request, field) != neutral]

    def _ticket(self, request: Request, listen: Listen) -> Ticket:  # type: ignore[override]
        ticket = super()._ticket(request, listen)
        if request.constraint is not None:
            if self._constraints is None:
                self._constraints = Constraints(self._text.to_str())
            for answer in ticket.answers:
                answer.sampling.guide = self._constraints.guide(request.constraint, ticket.stop_ids)
        return ticket

    def score(self, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]]) -> list[Scored]:
        """Log-probabilities of each continuation after its prompt (fp32), one row after another."""
        scored = []
        for place, (prompt, continuation) in enumerate(zip(prompt_ids, continuation_ids, strict=True)):
            if not prompt or not continuation:
                raise FledgeError(Problem(t("a prompt or continuation is empty"), t("item {n}", n=place)))
            ids = [*prompt, *continuation]
            self._check(ids, self.context + 1)
            logits = self._rows.logits(ids[:-1], len(prompt) - 1)
            peak = logits.max(-1)
            norms = peak + np.log(np.exp(logits - peak[:, None], dtype=np.float64).sum(-1))
            chosen = logits[np.arange(len(continuation)), list(continuation)]
            greedy = logits.argmax(-1) == np.asarray(continuation)
            scored.append(Scored(tuple((chosen - norms).tolist()), tuple(greedy.tolist())))
        return scored

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """The mean of the last hidden states over each text's tokens (fp32)."""
        vectors = []
        for place, text in enumerate(texts):
            ids = list(self._text.encode(text).ids)
            if not ids:
                raise FledgeError(Problem(t("the text is empty"), t("item {n}", n=place)))
            self._check(ids, self.context)
            vectors.append([float(x) for x in self._rows.hidden(ids).mean(0)])
        return vectors

    def _round(self, news: list[Answer]) -> None:
        """Read the newcomers, then give every answer a token."""
        try:
            self._sweep()
            if news:
                logits = self._rows.start([answer.ids for answer in news])
                self._running += news
                self._extend(news, logits)
                self._sweep()
            if self._running:
                logits = self._rows.step([answer.ids[-1] for answer in self._running])
                self._extend(self._running, logits)
                self._sweep()
        except Exception as error:  # a broken graph, no memory: the requests fail, the engine lives on
            log.exception("a step of the engine failed")
            problem = Problem(t("the model could not be computed"), found=f"{type(error).__name__}: {error}")
            for answer in [*self._running, *news]:
                answer.ticket.fail(Failed(problem))
            self._running = []
            self._rows.keep([])

    def _extend(self, answers: Sequence[Answer], logits: Floats) -> None:
        for answer, row in zip(list(answers), logits, strict=True):
            if answer.finished:
                continue
            if not np.isfinite(row.max()):
                answer.ticket.fail(FledgeError(Problem(t("the model gave no numbers (NaN or infinity)"))))
                continue
            try:
                token = sample(row[None], [answer.sampling])[0]
            except FledgeError as error:  # a constraint that nothing can go on from
                answer.ticket.fail(error)
                continue
            answer.take(token, logprobs_of(row[None], [token], [answer.sampling])[0])

    def _sweep(self) -> None:
        rows = [place for place, answer in enumerate(self._running) if not answer.finished]
        if len(rows) < len(self._running):
            self._rows.keep(rows)
            self._running = [self._running[row] for row in rows]
