"""Places in conversations where somebody answers: the context, and the answer that a person gave there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from fledge.core.artifact import digest_of
from fledge.records.kinds import Conversation, Message


@dataclass(frozen=True)
class Reply:
    """An answer and what was said before it."""

    conversation: Conversation
    index: int

    @property
    def key(self) -> str:
        """The conversation's id and the number of the turn."""
        return f"{self.conversation.id}:{self.index}"

    @property
    def text(self) -> str:
        """The answer."""
        return self.conversation.messages[self.index].content.strip()

    def prompt(self, turns: int) -> tuple[Message, ...]:
        """The system message, if any, and at most the last `turns` turns before the answer, a user's first."""
        before = self.conversation.messages[: self.index]
        system = [message for message in before[:1] if message.role == "system"]
        rest = list(before[len(system) :])[-turns:]
        while rest and rest[0].role != "user":
            rest.pop(0)
        return tuple([*system, *rest])


def replies(conversation: Conversation) -> Iterator[Reply]:
    """Every answer of the assistant's side to a user's turn."""
    messages = conversation.messages
    for index, (before, message) in enumerate(pairwise(messages), start=1):
        if (before.role, message.role) == ("user", "assistant") and message.content.strip():
            yield Reply(conversation, index)


def lottery(seed: int, *names: object) -> str:
    """A number drawn for a name, as hex of fixed width: whoever has the smallest comes first."""
    return digest_of([seed, *map(str, names)])[:16]


def one_each(conversations: Iterable[Conversation], seed: int, fits: Callable[[Reply], bool]) -> Iterator[Reply]:
    """One reply that fits from every conversation, the conversations drawn by lot, the languages taking turns.

    Taking the first n gives each language its equal share, as far as it has conversations.
    """
    by_language: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        by_language.setdefault(conversation.language, []).append(conversation)
    lines = [
        _first_that_fit(sorted(rows, key=lambda c: lottery(seed, c.id)), seed, fits)
        for _, rows in sorted(by_language.items())
    ]
    while lines:
        for line in list(lines):
            reply = next(line, None)
            if reply is None:
                lines.remove(line)
            else:
                yield reply


def _first_that_fit(rows: list[Conversation], seed: int, fits: Callable[[Reply], bool]) -> Iterator[Reply]:
    for conversation in rows:
        drawn = sorted(replies(conversation), key=lambda reply: lottery(seed, reply.key))
        found = next((reply for reply in drawn if fits(reply)), None)
        if found is not None:
            yield found
