"""The scheduler over a model that sees only what its blocks really hold: a wrong table gives a wrong text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fledge.inference.answer import Answer, Ticket
from fledge.inference.blocks import BlockPool
from fledge.inference.engine import Request
from fledge.inference.scheduler import Scheduler
from fledge.inference.step import Part

VOCABULARY = 1009
_WEIGHTS = np.random.default_rng(0).integers(1, VOCABULARY, 4096)


def following(tokens: np.ndarray[Any, Any]) -> int:
    """The token that the model puts after these: it depends on each of them and on where it stands."""
    return int(tokens @ _WEIGHTS[: len(tokens)]) % VOCABULARY


def text(prompt: Sequence[int], count: int, adapter: str = "") -> list[int]:
    """What the model writes, without blocks."""
    tokens = np.array([*prompt, *[0] * count]) + _offset(adapter)
    for place in range(len(prompt), len(tokens)):
        tokens[place] = following(tokens[:place]) + _offset(adapter)
    return [int(token) - _offset(adapter) for token in tokens[len(prompt) :]]


def _offset(adapter: str) -> int:
    """Adapters give the same token other keys."""
    return 10_000 * sum(adapter.encode())


class Model:
    """Stands in for the forward pass: a slot of a block holds the token (with its adapter) that was written there."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.slots = np.full((pool.size, pool.block_tokens), -1)
        self.read = 0  # tokens computed
        self.steps = 0

    def run(self, parts: list[Part]) -> list[int]:
        """One token for each row of logits that a part wants."""
        size, rows = self.pool.block_tokens, []
        written: set[int] = set()
        for part in parts:
            assert part.ids and len(part.blocks) * size >= part.end and max(part.blocks) < self.pool.reach
            places = range(part.start // size, -(-part.end // size))
            for place in places:
                assert part.blocks[place] not in written and not self.pool.fixed(part.blocks[place])
                written.add(part.blocks[place])
            for position, token in enumerate(part.ids, start=part.start):
                self.slots[part.blocks[position // size], position % size] = token + _offset(part.adapter)
        for part in parts:
            held = self.slots[part.blocks].reshape(-1)[: part.end]
            rows += [following(held[:end]) for end in range(part.end - part.wanted + 1, part.end + 1)]
            self.read += len(part.ids)
        self.steps += 1
        return rows


class Desk:
    """A scheduler with its model, and the texts that were asked of it."""

    def __init__(
        self, blocks: int = 64, size: int = 4, slots: int = 8, prefill: int = 16, caching: bool = True
    ) -> None:
        self.pool = BlockPool(blocks, size, caching)
        self.scheduler = Scheduler(self.pool, slots, prefill)
        self.model = Model(self.pool)
        self.tickets: list[Ticket] = []

    def ask(self, prompt: Sequence[int], count: int, **options: Any) -> Ticket:
        asked = Request(prompt_ids=tuple(prompt), temperature=0, stop_ids=(), max_new_tokens=count, **options)
        ticket = Ticket(asked, list(prompt), frozenset(), count, _Silent(), lambda _: None, lambda: None)
        self.scheduler.add(ticket)
        self.tickets.append(ticket)
        return ticket

    def step(self) -> None:
        """As the engine does it."""
        step = self.scheduler.schedule()
        assert step.shares or not self.scheduler, "work waits and nothing is done"
        for source, target in step.copies:
            self.model.slots[target] = self.model.slots[source]
        tokens = self.model.run(step.parts)
        for answer, rows in self.scheduler.advance(step):
            self.take(answer, [tokens[row] for row in rows])
        self.scheduler.settle()

    def take(self, answer: Answer, tokens: list[int]) -> None:
        """The first is sure; a guess that was right brings the next."""
        for guess, token in zip([*answer.draft, None], tokens, strict=True):
            if not answer.finished:
                answer.take(token, None)
            if token != guess:
                break
        answer.draft = []

    def cancel(self, ticket: Ticket) -> None:
        for answer in ticket.answers:
            if not answer.finished:
                answer.cancel()

    def run(self) -> None:
        while self.scheduler:
            self.step()
        self.check()

    def check(self) -> None:
        """Every text is what the model writes alone, and no block is left behind."""
        for ticket in self.tickets:
            expected = text(ticket.prompt_ids, ticket.limit, ticket.request.adapter)
            for answer in ticket.answers:
                assert answer.ids[len(ticket.prompt_ids) :] == expected
        assert self.pool.used == 0


class _Silent:
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return ""


def prompt(rng: random.Random, longest: int, begin: Sequence[int] = ()) -> list[int]:
    return [*begin, *(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest)))]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"size": 1, "blocks": 300},
        {"size": 32},
        {"slots": 1},
        {"prefill": 1},
        {"prefill": 1000, "slots": 100, "blocks": 400},
        {"blocks": 15},
    ],
    ids=["usual", "blocks of one", "large blocks", "one slot", "a token a step", "room for all", "little room"],
)
def test_every_text_is_what_the_model_writes_alone(shape: dict[str, int], caching: bool) -> None:
    rng = random.Random(1)
    shared = prompt(rng, 9)
    desk = Desk(**shape, caching=caching)
    for number in range(60):
        begin = shared if number % 3 == 0 else ()
        adapter = ("", "law", "verse")[number % 3 if number % 2 else 0]
        desk.ask(prompt(rng, 20, begin), rng.randint(1, 15), n=rng.choice([1, 1, 3]), adapter=adapter)
    desk.run()
    if shape.get("blocks") == 15:
        assert desk.scheduler.preemptions > 0
    assert (desk.pool.cached > 0) == caching
    # Answers to one prompt share what is read together; with one slot nothing is.
    assert (desk.scheduler.prefix_hit_tokens > 0) == (caching or desk.scheduler.max_slots > 1)


def test_a_step_takes_everybody_and_a_piece_of_the_newcomers() -> None:
    desk = Desk(prefill=6, slots=4)
    first = desk.ask([1, 2, 3], 9)
    desk.step()
    desk.ask([4] * 5, 3)
    desk.ask([5] * 8, 3)
    step = desk.scheduler.schedule()
    assert [(part.start, len(part.ids), part.wanted) for part in step.parts] == [(3, 1, 1), (0, 5, 1), (0, 1, 0)]
    assert step.shares[0].owner is first.answers[0] and step.rows == 2


def test_answers_to_one_prompt_read_it_once_and_share_it() -> None:
    desk = Desk(blocks=200, slots=100, prefill=100)
    question = list(range(1, 31))  # seven blocks and a half
    desk.ask(question, 6, n=4)
    desk.ask(question, 6)  # another request with the same words
    desk.step()
    assert desk.model.read == 30 and len(desk.scheduler.running) == 5
    assert desk.pool.used == 8, "everything is shared until somebody writes"
    desk.step()
    assert desk.pool.used == 7 + 5
    desk.run()


def test_who_begins_like_a_prompt_being_read_waits_for_it() -> None:
    desk = Desk(blocks=200, slots=100, prefill=100)
    opening = list(range(1, 41))
    for number in range(10):
        desk.ask([*opening, 100 + number, 200 + number], 4)
    desk.run()
    written = 10 * 3  # the last token is never read
    assert desk.model.read == 42 + 9 * 2 + written
    statistics = desk.scheduler.statistics()
    assert statistics.prefix_hit_tokens == 9 * 40 and statistics.prompt_tokens == 420


def test_a_chat_finds_its_last_turn() -> None:
    desk = Desk()
    first = desk.ask(list(range(1, 11)), 8)
    desk.run()
    before = desk.model.read
    desk.ask([*first.answers[0].ids, 7, 8, 9], 1)
    desk.run()
    assert desk.model.read - before == 21 - 16, "question and answer but for what its last block lacks"


def test_the_youngest_gives_way_and_comes_back() -> None:
    desk = Desk(blocks=10, size=4, slots=8, prefill=100)
    old, middle, young = (desk.ask([n] * 9, 20) for n in (1, 2, 3))
    finished: list[Ticket] = []
    while desk.scheduler:
        desk.step()
        finished += [ticket for ticket in (old, middle, young) if ticket.finished and ticket not in finished]
    assert desk.scheduler.preemptions > 0 and finished == [old, middle, young]
    desk.check()


def test_a_draft_gives_way_before_anybody_is_put_back() -> None:
    desk = Desk(blocks=6, size=4, prefill=100)
    for n in (1, 2):
        desk.ask([n] * 6, 5)
    desk.step()
    for answer in desk.scheduler.running:
        answer.draft = [0] * 7
    step = desk.scheduler.schedule()
    assert [len(part.ids) for part in step.parts] == [8, 1] and desk.scheduler.preemptions == 0


def test_right_and_wrong_drafts_change_nothing() -> None:
    rng = random.Random(3)
    desk = Desk(blocks=30, slots=5)
    for _ in range(30):
        desk.ask(prompt(rng, 12), rng.randint(2, 12))
    while desk.scheduler:
        for answer in desk.scheduler.running:
            ticket = answer.ticket
            done = len(answer.ids) - len(ticket.prompt_ids)
            rest = text(ticket.prompt_ids, ticket.limit)[done : done + rng.randint(0, 5)]
            answer.draft = [token if rng.random() < 0.7 else token + 1 for token in rest]
        desk.step()
    desk.check()
    assert desk.model.steps < 100


def test_a_prompt_that_wants_its_logits_is_computed_whole() -> None:
    desk = Desk(prefill=8)
    desk.ask(list(range(1, 21)), 2)
    desk.run()
    before = desk.model.read
    desk.ask(list(range(1, 21)), 2, prompt_logprobs=0)
    step = desk.scheduler.schedule()
    assert [(part.start, len(part.ids), part.wanted) for part in step.parts] == [(0, 8, 8)]
    desk.model.run(step.parts)
    desk.scheduler.advance(step)
    desk.run()
    assert desk.model.read - before == 21


def test_a_reader_who_leaves_does_not_take_the_prompt_along() -> None:
    desk = Desk(prefill=5, slots=100, blocks=100)
    first, second, third = (desk.ask(range(1, 20), 3) for _ in range(3))
    for leaving in (first, third):
        desk.step()
        desk.cancel(leaving)
        desk.scheduler.sweep()
        desk.tickets.remove(leaving)
    desk.run()
    assert second.finished and desk.model.read == 19 + 2


def test_ten_thousand_requests_and_their_cancellation_leave_no_block_behind() -> None:
    rng = random.Random(4)
    desk = Desk(blocks=70, size=4, slots=32, prefill=64)
    openings = [prompt(rng, 12) for _ in range(20)]
    asked = cancelled = 0
    while asked < 10_000 or desk.scheduler:
        if len(desk.scheduler.waiting) < 50:
            for _ in range(min(10_000 - asked, rng.randint(0, 30))):
                desk.ask(prompt(rng, 6, rng.choice(openings)), rng.choice([1, 2, 3, 20]), n=rng.choice([1, 1, 1, 2]))
                asked += 1
        for _ in range(rng.randint(0, 4)):
            ticket = desk.tickets.pop(rng.randrange(len(desk.tickets))) if desk.tickets else None
            if ticket is not None and not ticket.finished:
                desk.cancel(ticket)
                cancelled += 1
        desk.scheduler.sweep()
        desk.step()
        assert desk.pool.used <= desk.pool.size and desk.pool.reach <= desk.pool.size
        if len(desk.tickets) > 200:  # those that are through
            finished = [ticket for ticket in desk.tickets if ticket.finished]
            desk.tickets = [ticket for ticket in desk.tickets if not ticket.finished]
            for ticket in finished:
                assert ticket.answers[0].ids[len(ticket.prompt_ids) :] == text(ticket.prompt_ids, ticket.limit)
    desk.check()
    assert cancelled > 1000 and desk.scheduler.preemptions > 50 and desk.scheduler.prefix_hit_tokens > 10_000
