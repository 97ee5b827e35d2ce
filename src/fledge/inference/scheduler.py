"""Who is computed next. Answers wait, their prompts are read, and then they are written together until they end.

A step takes the next token of every running answer and, beside them, pieces of the prompts of newcomers: answers join
and leave between two steps (iteration-level scheduling: Yu et al., Orca, 2022; chunked prefill: Agrawal et al.,
Sarathi, 2023). Newcomers enter in the order of arrival as long as there are blocks; when blocks run out the youngest is
put back and read again later. Nothing is decided by the clock: the same requests in the same order give the same steps.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from fledge.inference.answer import Answer, Ticket
from fledge.inference.blocks import BlockPool, Table, wasted
from fledge.inference.engine import TokenLogprob
from fledge.inference.step import Part

_arrival = attrgetter("arrival")


@dataclass
class Reading:
    """A prompt that is being read, once for all answers that go on from it (a prompt put back includes its answer)."""

    key: object
    """what is read; answers with equal keys are read together"""
    table: Table
    answers: list[Answer]
    logprobs_asked: int | None
    """how many alternatives the prompt's own log-probabilities come with; None: they are not wanted"""
    logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """those of the tokens read so far; the first token has none"""

    @property
    def left(self) -> int:
        """Tokens still to read."""
        return len(self.table.ids) - self.table.held

    @property
    def arrival(self) -> int:
        return self.answers[0].arrival


@dataclass
class Share:
    """What one answer or reading contributes to a step."""

    owner: Answer | Reading
    parts: list[Part]
    rows: range
    """the rows of logits that they give"""


@dataclass
class Step:
    """One forward pass: who contributes what, and what has to be done to blocks before it."""

    shares: list[Share] = field(default_factory=list)
    unclean: list[int] = field(default_factory=list)
    """blocks to be made zero before anything is computed …"""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """… and then (source, target) of blocks to be copied"""
    rows: int = 0

    @property
    def parts(self) -> list[Part]:
        return [part for share in self.shares for part in share.parts]

    def add(self, owner: Answer | Reading, parts: list[Part]) -> None:
        """Compute these for `owner`."""
        first, self.rows = self.rows, self.rows + sum(part.wanted for part in parts)
        self.shares.append(Share(owner, parts, range(first, self.rows)))


@dataclass(frozen=True)
class Statistics:
    """What the engine is doing, and what it has done since it was made."""

    waiting: int
    reading: int
    running: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    fragmentation: float
    """share of the used blocks' slots that hold no token, last blocks included"""
    prompt_tokens: int
    """tokens of prompts that were to be read (again after a preemption)"""
    prefix_hit_tokens: int
    """those of them that were found in the prefix cache or read once for several answers"""
    preemptions: int
    draft_tokens: int
    accepted_tokens: int

    @property
    def utilisation(self) -> float:
        """Share of all blocks that are used."""
        return self.blocks_used / self.blocks_total


class Scheduler:
    """Three places where an answer can be: `waiting`, in a reading, `running`; each in the order of arrival."""

    def __init__(self, pool: BlockPool, max_slots: int, prefill_tokens: int, logits_tokens: int = 512) -> None:
        """`max_slots`: answers that are read or running together; `prefill_tokens`: prompt tokens read in one step;
        `logits_tokens`: those of one prompt whose logits are wanted all."""
        self.pool, self.max_slots, self.prefill_tokens = pool, max_slots, prefill_tokens
        self.logits_tokens = logits_tokens
        self.waiting: list[Answer] = []
        self.readings: dict[object, Reading] = {}  # by what is read
        self.running: list[Answer] = []
        self.preemptions = self.prompt_tokens = self.prefix_hit_tokens = 0
        self.draft_tokens = self.accepted_tokens = 0
        """guessed tokens that were checked, and those of them that stayed"""
        self._arrivals = 0

    def add(self, ticket: Ticket) -> None:
        """Queue a request's answers."""
        for answer in ticket.answers:
            answer.arrival = self._arrivals = self._arrivals + 1
            answer.tables = [Table(self.pool, answer.ids, ticket.request.adapter, ticket.cache_key)]
            self.waiting.append(answer)

    def __bool__(self) -> bool:
        return bool(self.waiting or self.readings or self.running)

    def tickets(self) -> Iterator[Ticket]:
        """Every request that has an answer here, once."""
        reading = [answer for reading in self.readings.values() for answer in reading.answers]
        yield from dict.fromkeys(answer.ticket for answer in [*self.running, *reading, *self.waiting])

    # ---- before a step

    def schedule(self) -> Step:
        """What to compute now: the next token of all who run, then a piece of every reading."""
        step = Step()
        self._go_on(step)
        self._admit()
        room = self.prefill_tokens
        for reading in self.readings.values():
            room -= self._read(reading, room, step)
        step.unclean, self.pool.unclean = self.pool.unclean, []
        return step

    def _go_on(self, step: Step) -> None:
        place = 0
        while place < len(self.running):
            answer = self.running[place]
            if self._make_room(answer):
                parts = []
                for table in answer.tables:
                    step.copies += table.reserve(table.held + 1 + len(answer.draft))
                    ids = [table.ids[-1], *answer.draft]
                    parts.append(Part(ids, table.held, table.blocks, len(ids), table.adapter))
                step.add(answer, parts)
                place += 1

    def _make_room(self, answer: Answer) -> bool:
        """Blocks for its next tokens: give up its draft, then put back the youngest, in the end the answer itself."""
        while (missing := _missing(answer)) and missing > self._spare():
            if answer.draft:
                answer.draft = []
                continue
            here: list[Answer | Reading] = [self.running[-1], *self.readings.values()]
            youngest = max(here, key=_arrival)
            self._put_back(youngest)
            if youngest is answer:
                return False
        return True

    def _spare(self) -> int:
        """Blocks that can be taken and are not needed by the prompts that are being read."""
        readings = self.readings.values()
        return self.pool.available - sum(reading.table.missing(len(reading.table.ids)) for reading in readings)

    def _put_back(self, owner: Answer | Reading) -> None:
        """Give up its blocks; what it has to read again it will find in the cache, as far as it is still there."""
        self.preemptions += 1
        if isinstance(owner, Reading):
            del self.readings[owner.key]
            owner.table.release()
            answers = owner.answers
        else:
            self.running.remove(owner)
            owner.put_back()
            answers = [owner]
        for answer in answers:
            insort(self.waiting, answer, key=_arrival)

    def _admit(self) -> None:
        """Begin to read for those who wait, in their order, while there are slots, tokens of this step and blocks.

        Whoever begins like a prompt that is being read waits until that part is there (and keeps its slot).
        """
        if not self.waiting:
            return
        slots = self.max_slots - len(self.running) - sum(len(reading.answers) for reading in self.readings.values())
        room = self.prefill_tokens - sum(reading.left for reading in self.readings.values())
        promised = {digest for reading in self.readings.values() for digest in self._promises(reading)}
        held_back: list[Answer] = []
        for taken, answer in enumerate(self.waiting[: max(0, slots)]):
            asked = None if answer.ticket.prompt_logprobs else answer.ticket.request.prompt_logprobs
            key = (answer.ticket.cache_key, asked, tuple(answer.ids))
            if key in self.readings:
                self.readings[key].answers.append(answer)
                self._count(len(answer.ids), len(answer.ids))
                continue
            # Whoever wants the logits of its prompt has to compute all of it.
            matches = answer.table.matches() if asked is None else []
            if promised and asked is None and self._awaited(answer.table, len(matches)) in promised:
                held_back.append(answer)
                continue
            if room <= 0 or not self._fits(answer.table, matches):
                held_back += self.waiting[taken:slots]
                break
            table = Table(self.pool, answer.ids, answer.table.adapter, answer.table.key)
            table.begin(matches)
            reading = self.readings[key] = Reading(key, table, [answer], asked)
            self._count(len(answer.ids), table.held)
            promised |= set(self._promises(reading))
            room -= reading.left
        self.waiting[: max(0, slots)] = held_back

    def _promises(self, reading: Reading) -> Iterator[bytes]:
        """The digests of the blocks that this reading is going to fill."""
        if self.pool.caching:
            table, size = reading.table, self.pool.block_tokens
            yield from (table.digest(place) for place in range(table.held // size, len(table.ids) // size))

    def _awaited(self, table: Table, matched: int) -> bytes | None:
        """The first block of a newcomer that is not there, where it could be shared."""
        return table.digest(matched) if matched < (len(table.ids) - 1) // self.pool.block_tokens else None

    def _fits(self, table: Table, matches: list[int]) -> bool:
        """Whether a newcomer finds its blocks and leaves one for the next token of everybody, itself included."""
        need = -(-len(table.ids) // self.pool.block_tokens) - len(matches)
        available = self._spare() - sum(self.pool.idle(block) for block in matches)
        if not self.running and not self.readings:
            return need <= available
        ahead = len(self.running) + sum(len(reading.answers) for reading in self.readings.values()) + 1
        return need + ahead <= available

    def _count(self, tokens: int, hit: int) -> None:
        self.prompt_tokens += tokens
        self.prefix_hit_tokens += hit

    def _read(self, reading: Reading, room: int, step: Step) -> int:
        """The next piece of a prompt, `room` tokens at most; returns its tokens."""
        table, whole = reading.table, reading.logprobs_asked is not None
        count = min(reading.left, room, self.logits_tokens if whole else room)
        if count > 0:
            step.copies += table.reserve(table.held + count)
            ids = table.ids[table.held : table.held + count]
            wanted = count if whole else int(count == reading.left)
            step.add(reading, [Part(ids, table.held, table.blocks, wanted, table.adapter)])
        return count

    # ---- after a step

    def advance(self, step: Step) -> list[tuple[Answer, range]]:
        """The parts have been read. Who gets tokens now, with the rows of logits they come from."""
        found: list[tuple[Answer, range]] = []
        for share in step.shares:
            if isinstance(share.owner, Answer):
                found.append((share.owner, share.rows))
            else:
                reading = share.owner
                reading.table.advance(share.parts[0].end)
                if not reading.left:
                    self._start(reading)
                    found += [(answer, share.rows[-1:]) for answer in reading.answers]
        return found

    def _start(self, reading: Reading) -> None:
        """Its prompt is read: all its answers run, sharing its blocks."""
        del self.readings[reading.key]
        for answer in reading.answers:
            answer.table.fork(reading.table)
            insort(self.running, answer, key=_arrival)
            if reading.logprobs_asked is not None:
                answer.ticket.prompt_logprobs = tuple(reading.logprobs)
        reading.table.release()

    def settle(self) -> None:
        """Everybody has taken their tokens (or was cancelled): the tables hold what stayed, the finished leave."""
        for answer in self.running:
            for table in answer.tables:
                if answer.failed:
                    table.unsound()
                else:
                    table.advance(len(table.ids) - 1)
                    table.sound()
                if answer.finished:
                    table.release()
        self.running = [answer for answer in self.running if not answer.finished]

    def sweep(self) -> None:
        """Let go of everything that was cancelled or failed, wherever it is."""
        self.settle()
        self.waiting = [answer for answer in self.waiting if not answer.finished]
        for key, reading in list(self.readings.items()):
            reading.answers = [answer for answer in reading.answers if not answer.finished]
            if not reading.answers:
                reading.table.release()
                del self.readings[key]

    def clear(self) -> None:
        """Forget everything."""
        for table in self._tables():
            table.unsound()
            table.release()
        self.waiting, self.readings, self.running = [], {}, []
        self.pool.forget()

    def _tables(self) -> list[Table]:
        """All that hold blocks."""
        tables = [table for answer in list(self.running) for table in answer.tables]
        return tables + [reading.table for reading in list(self.readings.values())]

    def statistics(self) -> Statistics:
        """Counted now; any thread may ask."""
        pool, running, readings = self.pool, list(self.running), list(self.readings.values())
        slots = pool.used * pool.block_tokens
        empty = wasted(self._tables(), pool.block_tokens)
        return Statistics(
            waiting=len(self.waiting),
            reading=sum(len(reading.answers) for reading in readings),
            running=len(running),
            blocks_total=pool.size,
            blocks_used=pool.used,
            blocks_cached=pool.cached,
            fragmentation=empty / slots if slots else 0.0,
            prompt_tokens=self.prompt_tokens,
            prefix_hit_tokens=self.prefix_hit_tokens,
            preemptions=self.preemptions,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
        )


def _missing(answer: Answer) -> int:
    """Blocks that an answer needs for its next tokens."""
    return sum(table.missing(table.held + 1 + len(answer.draft)) for table in answer.tables)
