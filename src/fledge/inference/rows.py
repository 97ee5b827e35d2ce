"""Plain batching: answers that decode together, one row each or one for each beam, until the last of them ends."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.answer import Answer
from fledge.inference.beam import Beam
from fledge.inference.engine import Request
from fledge.inference.sampling import Floats, Sampling, logprobs_of
from fledge.inference.searching import BeamAnswer


class RowBeams(BeamAnswer):
    """A beam search whose sequences are rows of the batch, not tables of blocks."""

    def begin(self, sampling: Sampling) -> None:
        """Search with this state."""
        self.sampling = sampling
        self._search = self._begin()

    @property
    def beams(self) -> list[Beam]:
        """The texts that go on, a row each."""
        return self._search.beams

    def _branch(self) -> None:
        """Nothing to hand on: the batch is put in order by `going_on`."""


def begin(answer: Answer, sampling: Sampling) -> None:
    """Let an answer draw with the decoder's own state instead of one that knows the encoder's tokens."""
    if isinstance(answer, RowBeams):
        answer.begin(sampling)
    else:
        answer.sampling = sampling


def rows_of(request: Request) -> int:
    """Rows of a batch that a request takes at most."""
    return max(request.best_of or request.n, request.beams)


def extend(answers: list[Answer], widths: list[int], logits: Tensor, forced: int | None) -> None:
    """Give every answer its next token from its rows of logits (B, V); who gets no numbers fails alone."""
    sound = torch.isfinite(logits.amax(-1)).cpu().numpy()
    rows = logits.cpu().numpy()
    first = 0
    for answer, width in zip(answers, widths, strict=True):
        mine = slice(first, first + width)
        first += width
        if answer.finished:  # a sibling's failure may have ended it
            continue
        if not sound[mine].all():
            answer.ticket.fail(FledgeError(Problem(t("the model gave no numbers (NaN or infinity)"))))
            continue
        try:
            if forced is None:
                answer.extend(rows[mine])
            else:
                _force(answer, forced, rows[mine])
        except FledgeError as error:  # its constraint leaves no way to go on
            answer.ticket.fail(error)


def _force(answer: Answer, token: int, rows: Floats) -> None:
    """Let the model's own first token begin an answer; a constraint speaks of what comes behind it."""
    if isinstance(answer, RowBeams):
        certain = np.full_like(rows, -np.inf)
        certain[:, token] = 0
        state = answer.beams[0].sampling
        guide, state.guide = state.guide, None
        answer.extend(certain)
        for beam in answer.beams:
            beam.sampling.guide = guide.fork() if guide is not None else None
    else:
        guide, answer.sampling.guide = answer.sampling.guide, None
        answer.take(token, logprobs_of(rows, [token], [answer.sampling])[0])
        answer.sampling.guide = guide


def going_on(answers: list[Answer], widths: list[int]) -> tuple[list[Answer], list[int], list[int], list[int]]:
    """Who goes on: the answers, the rows of each, the last token of every row, and the row from which it goes on."""
    going: list[Answer] = []
    counts: list[int] = []
    last: list[int] = []
    place: list[int] = []
    first = 0
    for answer, width in zip(answers, widths, strict=True):
        if not answer.finished:
            rows = [(answer.ids[-1], first)]
            if isinstance(answer, RowBeams):
                rows = [(beam.tokens[-1], first + beam.parent) for beam in answer.beams]
            going.append(answer)
            counts.append(len(rows))
            last += [token for token, _ in rows]
            place += [row for _, row in rows]
        first += width
    return going, counts, last, place
