"""Who guesses what before a step of the engine: every running answer's grammar and text, then a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fledge.inference.drafting import DraftModel, Want
from fledge.inference.speculation import Draft

if TYPE_CHECKING:
    from fledge.inference.answer import Answer

_ROWS = 32
"""tokens that a step may read for its running answers, guesses included: beyond that computing costs more than it
saves"""


class Guessing:
    """The guesses of one engine. How many there are depends on the batch only where no answer can."""

    def __init__(self, lookup: bool, model: DraftModel | None = None) -> None:
        self._lookup, self._model = lookup, model
        self._drafted: list[Answer] = []

    def propose(self, running: Sequence[Answer]) -> None:
        """Give every answer that wants guesses its draft for the next step."""
        each = _ROWS // max(1, len(running)) - 1
        wants: list[tuple[Answer, Want]] = []
        for answer in running:
            room = answer.room - 1 if answer.guesser is not None else 0  # the last token is never guessed
            if room < 1 or answer.guesser is None:
                continue
            drawn = self._model is not None and answer.ticket.request.temperature > 0
            if not drawn:
                guide = answer.sampling.guide
                answer.propose(answer.guesser.guess(answer.ids, min(room, each), guide, self._lookup))
            if self._model is not None and not answer.draft:
                # With probabilities a guess takes part in the draw: there the batch must not have a say.
                count = min(answer.guesser.draft_pace.wanted(), room if drawn else min(room, each))
                stop_ids = answer.ticket.stop_ids
                wants.append((answer, Want(answer, answer.ids, count, answer.sampling, stop_ids)))
        if self._model is not None:
            self._ask(self._model, wants)

    def _ask(self, model: DraftModel, wants: list[tuple[Answer, Want]]) -> None:
        known = set(self._drafted)
        self._drafted += [answer for answer, _ in wants if answer not in known]
        drafts: list[Draft] = model.propose([want for _, want in wants])
        for (answer, _), draft in zip(wants, drafts, strict=True):
            answer.propose(draft)

    def settle(self) -> None:
        """Let the draft model forget the answers that have ended."""
        for answer in self._drafted:
            if self._model is not None and answer.finished:
                self._model.release(answer)
        self._drafted = [answer for answer in self._drafted if not answer.finished]
