"""An engine in this process around a graph that another library computes: the loop and the sampling are ours, so that
every option means what it means with the native engine.

Newcomers are read together, then all answers take one token a step; whoever is finished leaves at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.answer import Answer
from fledge.inference.engine import Request, Scored
from fledge.inference.engines.in_process import InProcessEngine
from fledge.inference.prompt import check_ids
from fledge.inference.sampling import logprobs_of, sample

Floats = NDArray[np.float32]

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

    def refused(self, request: Request) -> list[str]:
        return [field for field, neutral in _REFUSED if getattr(request, field) != neutral]

    def score(self, prompt_ids: Sequence[Sequence[int]], continuation_ids: Sequence[Sequence[int]]) -> list[Scored]:
        """Log-probabilities of each continuation after its prompt (fp32), one row after another."""
        scored = []
        for place, (prompt, continuation) in enumerate(zip(prompt_ids, continuation_ids, strict=True)):
            if not prompt or not continuation:
                raise FledgeError(Problem(t("a prompt or continuation is empty"), t("item {n}", n=place)))
            ids = [*prompt, *continuation]
            check_ids(ids, self.context + 1, self._vocabulary)
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
            check_ids(ids, self.context, self._vocabulary)
            vectors.append([float(x) for x in self._rows.hidden(ids).mean(0)])
        return vectors

    def _advance(self, news: list[Answer]) -> None:
        """Read the newcomers, then give every answer a token."""
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

    def _clear(self) -> None:
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
