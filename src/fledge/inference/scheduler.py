"""Who is computed next. Answers wait, are prefilled in small groups, and then decode together until they end.

Answers join and leave between two steps (iteration-level scheduling: Yu et al., Orca, 2022). Nothing is decided by
the clock: the same requests in the same order give the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor
from transformers import DynamicCache

from fledge.inference.answer import Answer, Ticket
from fledge.inference.cache import SlotCache

_HEADROOM = 64
"""tokens of room ahead that a newcomer must find, so that it is not put back at once"""


@dataclass
class Prefill:
    """Prompts that are being read together, padded on the left; answers to the same prompt share a row."""

    rows: dict[tuple[int, ...], list[Answer]] = field(default_factory=dict)
    cache: DynamicCache = field(default_factory=DynamicCache)
    done: int = 0
    """columns already in the cache"""

    @property
    def width(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.rows), default=0)

    @property
    def answers(self) -> list[Answer]:
        return [answer for answers in self.rows.values() for answer in answers]


class Scheduler:
    """Three places where an answer can be: `waiting`, `prefill`, `running` (its slot is its place in the list)."""

    def __init__(self, max_slots: int, prefill_tokens: int, cache_bytes: int) -> None:
        self.max_slots, self.prefill_tokens = max_slots, prefill_tokens
        self.waiting: deque[Answer] = deque()
        self.prefill: Prefill | None = None
        self.running: list[Answer] = []
        self.cache = SlotCache(cache_bytes)
        self.preemptions = 0
        """how often an answer was put back for want of room"""
        self._arrivals = 0

    def add(self, ticket: Ticket) -> None:
        """Queue a request's answers."""
        for answer in ticket.answers:
            answer.arrival = self._arrivals = self._arrivals + 1
            self.waiting.append(answer)

    def __bool__(self) -> bool:
        return bool(self.waiting or self.prefill or self.running)

    def tickets(self) -> Iterator[Ticket]:
        """Every request that has an answer here, once."""
        prefilling = self.prefill.answers if self.prefill else []
        yield from dict.fromkeys(answer.ticket for answer in [*self.running, *prefilling, *self.waiting])

    def admit(self) -> Prefill | None:
        """The group to prefill now, if any: the one begun, or the first who wait and for whom there is room."""
        # While slots are scarce a few are let gather: one group of eight costs about as much as one of one.
        enough = min(len(self.waiting), max(1, self.max_slots // 8))
        if self.prefill is None and self.waiting and self.max_slots - len(self.running) >= enough:
            group = Prefill()
            while self.waiting and self._has_room(group, self.waiting[0]):
                answer = self.waiting.popleft()
                group.rows.setdefault(tuple(answer.ids), []).append(answer)
            self.prefill = group if group.rows else None
        return self.prefill

    def _has_room(self, group: Prefill, answer: Answer) -> bool:
        rows = len(self.running) + len(group.answers) + 1
        if rows == 1:
            return True
        width = max(group.width, len(answer.ids))
        new_rows = len(group.rows) + (tuple(answer.ids) not in group.rows)
        return (
            rows <= self.max_slots
            and (not group.rows or new_rows * width <= self.prefill_tokens)
            and self.cache.fits(rows, max(width, self.cache.longest) + _HEADROOM)
        )

    def start(self, prefill: Prefill, logits: Tensor) -> tuple[list[Answer], Tensor]:
        """The group has been read: give every answer a slot. Returns the answers and the logits (B, V) for each."""
        self.prefill = None
        answers, rows = [], []
        for row, (ids, sharing) in enumerate(prefill.rows.items()):
            for answer in sharing:
                if not answer.finished:
                    self.cache.adopt(prefill.cache, row, start=prefill.width - len(ids))
                    self.running.append(answer)
                    answers.append(answer)
                    rows.append(row)
        return answers, logits[rows]

    def make_room(self) -> None:
        """Before a step that makes every answer longer: put the youngest back until the cache holds the rest."""
        while len(self.running) > 1 and not self.cache.fits(len(self.running), self.cache.longest + 1):
            youngest = max(range(len(self.running)), key=lambda slot: self.running[slot].arrival)
            self.waiting.appendleft(self.running[youngest])
            self._leave(youngest)
            self.preemptions += 1

    def sweep(self) -> None:
        """Let go of everything that is finished."""
        for slot in reversed(range(len(self.running))):
            if self.running[slot].finished:
                self._leave(slot)
        if any(answer.finished for answer in self.waiting):
            self.waiting = deque(answer for answer in self.waiting if not answer.finished)
        if self.prefill and all(answer.finished for answer in self.prefill.answers):
            self.prefill = None

    def _leave(self, slot: int) -> None:
        self.cache.release(slot)
        self.running[slot] = self.running[-1]
        self.running.pop()

    def clear(self) -> None:
        """Forget everything."""
        self.waiting.clear()
        self.running.clear()
        self.prefill, self.cache = None, SlotCache(self.cache.budget)
