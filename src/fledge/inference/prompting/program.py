"""A technique is a program that asks an engine: a generator that gives lists of requests and is sent their results.

A program does not know the engine, so that several of them can go on side by side: `together` makes one of many whose
requests enter the engine as one batch, round by round. What comes out depends on no thread and no clock.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol, TypeAlias, TypeVar

from fledge.core.errors import FledgeError
from fledge.inference.engine import Request, Result

T = TypeVar("T")
Program: TypeAlias = Generator[list[Request], list[Result], T]


class Generates(Protocol):
    """All that a technique needs of an engine."""

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """All answers, in the order of the requests."""


def drive(engine: Generates, program: Program[T]) -> T:
    """Run a program to its end. An error of the engine as a whole becomes that of every request of the round."""
    try:
        requests = next(program)
        while True:
            try:
                results = engine.generate(requests)
            except FledgeError as error:
                results = [Result(error=error)] * len(requests)
            requests = program.send(results)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    finally:
        program.close()


def together(programs: Sequence[Program[T]]) -> Program[list[T]]:
    """All of them side by side: each round's requests are one list. The first error ends all."""
    done: dict[int, T] = {}
    asked: dict[int, list[Request]] = {}

    def advance(index: int, results: list[Result] | None) -> None:
        try:
            asked[index] = programs[index].send(results) if results is not None else next(programs[index])
        except StopIteration as end:
            done[index] = end.value
            asked.pop(index, None)

    try:
        for index in range(len(programs)):
            advance(index, None)
        while asked:
            results = yield [request for requests in asked.values() for request in requests]
            for index, requests in list(asked.items()):
                mine, results = results[: len(requests)], results[len(requests) :]
                advance(index, mine)
        return [done[index] for index in range(len(programs))]
    finally:
        for program in programs:
            program.close()
