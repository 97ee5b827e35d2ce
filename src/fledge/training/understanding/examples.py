"""Texts as token rows with what is to be known of them, and batches of these: pure functions of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fledge.data.tokens.batches import grouped, permutation
from fledge.data.tokens.packing import plain

IGNORED = -100
MULTIPLE = 8
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A text's token ids and its class, or a class for each of them (−100 where there is none)."""

    ids: Sequence[int]
    label: int | Sequence[int] = 0


class Encoder:
    """Texts as the family's tokenizer encodes them, with its own [CLS], [SEP] or end, cut to `max_length` tokens.

    No spelling of a control token in a text is taken for one. `end` is put behind every text that does not have it:
    the heads of T5 and BART read that token.
    """

    def __init__(self, tokenizer: Any, max_length: int, end: int | None = None) -> None:
        self.backend, self.end = plain(tokenizer), end
        self.backend.enable_truncation(max_length - (end is not None))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._ended(encoding.ids) for encoding in self.backend.encode_batch(list(texts))]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self.end is None or not ids or ids[-1] == self.end else [*ids, self.end]

    def words(self, words: Sequence[str]) -> tuple[list[int], list[int | None]]:
        """Ids of a text given as words, and the word of each (None for what the tokenizer added)."""
        encoding = self.backend.encode(list(words), is_pretokenized=True)
        return encoding.ids, encoding.word_ids


def collate(examples: Sequence[Example], pad_id: int, length: int = 0) -> Arrays:
    """`input_ids`, `attention_mask` (B, T) and `labels` (B,) or (B, T), padded on the right to a multiple of 8."""
    longest = max(length, *(len(example.ids) for example in examples))
    shape = (len(examples), -(-longest // MULTIPLE) * MULTIPLE)
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    each = isinstance(examples[0].label, int)
    labels = np.full(shape[:1] if each else shape, IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)], mask[row, : len(example.ids)] = example.ids, 1
        if each:
            labels[row] = example.label
        else:
            labels[row, : len(example.ids)] = example.label
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class ExampleBatches:
    """Labelled rows, those of like length together; every row once an epoch."""

    def __init__(self, examples: Sequence[Example], batch_size: int, pad_id: int, seed: int) -> None:
        self.examples, self.batch_size, self.pad_id = examples, batch_size, pad_id
        lengths = np.array([len(example.ids) for example in examples], dtype=np.int64)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: grouped(lengths, batch_size, 32, seed, epoch))

    def __len__(self) -> int:
        """Steps of one epoch."""
        return -(-len(self.examples) // self.batch_size)

    def batch(self, step: int) -> Arrays:
        epoch, index = divmod(step, len(self))
        return collate([self.examples[row] for row in self._epoch(epoch)[index]], self.pad_id)


class PairBatches:
    """Texts with their partners (`anchor`, `positive`, `negative`): whole batches in a new order every epoch.

    What is left over at the end of an epoch is left out of it: a smaller batch would be an easier task.
    """

    def __init__(self, sides: Mapping[str, Sequence[Sequence[int]]], batch_size: int, pad_id: int, seed: int) -> None:
        self.sides, self.pad_id, self.seed = sides, pad_id, seed
        self.rows = len(next(iter(sides.values())))
        self.batch_size = min(batch_size, self.rows)
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(self.rows, seed, epoch))

    def __len__(self) -> int:
        """Steps of one epoch."""
        return self.rows // self.batch_size

    def batch(self, step: int) -> Arrays:
        epoch, index = divmod(step, len(self))
        return self.of(self._order(epoch)[index * self.batch_size :][: self.batch_size])

    def of(self, rows: NDArray[np.int64]) -> Arrays:
        """The sides of some rows."""
        made = {}
        for name, texts in self.sides.items():
            arrays = collate([Example(texts[row]) for row in rows], self.pad_id)
            made[name] = {key: arrays[key] for key in ("input_ids", "attention_mask")}
        return made


class TaskBatches:
    """Small tasks for meta-learning: of each, `steps` inner batches drawn from a few `shots` of every class.

    A family holds one class's examples by its name. A task takes a family, `ways` of its classes in a random order
    (which gives each its number), and `shots` examples of each. Arrays have the shape (tasks, steps, rows, …).
    """

    def __init__(
        self,
        families: Sequence[Mapping[str, Sequence[Example]]],
        ways: int,
        shots: int,
        steps: int,
        inner_batch: int,
        tasks: int,
        pad_id: int,
        seed: int,
    ) -> None:
        self.families, self.ways, self.shots, self.steps = families, ways, shots, steps
        self.inner_batch = min(inner_batch, ways * shots)
        self.tasks, self.pad_id, self.seed = tasks, pad_id, seed
        every = (example for family in families for examples in family.values() for example in examples)
        self.longest = max(len(example.ids) for example in every)

    def __len__(self) -> int:
        """Steps after which there were as many tasks as there are families and classes."""
        return max(1, sum(map(len, self.families)) // (self.tasks * self.ways))

    def batch(self, step: int) -> Arrays:
        tasks = [self.task(step * self.tasks + index)[0] for index in range(self.tasks)]
        return {name: np.stack([task[name] for task in tasks]) for name in tasks[0]}

    def task(self, number: int, queries: int = 0) -> tuple[Arrays, list[Example]]:
        """Inner batches (steps, rows, …) of task `number`, and `queries` further examples of each of its classes."""
        family = self.families[int(permutation(len(self.families), self.seed, number, 1)[0])]
        names = [sorted(family)[i] for i in permutation(len(family), self.seed, number, 2)[: self.ways]]
        support: list[Example] = []
        asked: list[Example] = []
        for label, name in enumerate(names):
            order = permutation(len(family[name]), self.seed, number, 3 + label)
            drawn = [relabelled(family[name][i], label) for i in order[: self.shots + queries]]
            support += drawn[: self.shots]
            asked += drawn[self.shots :]
        rows: list[int] = []
        lap = 0
        while len(rows) < self.steps * self.inner_batch:
            rows += permutation(len(support), self.seed, number, -1 - lap).tolist()
            lap += 1
        cut = [rows[i * self.inner_batch :][: self.inner_batch] for i in range(self.steps)]
        batches = [collate([support[i] for i in some], self.pad_id, self.longest) for some in cut]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}, asked


def relabelled(example: Example, label: int) -> Example:
    """The example under its task's number for its class; one whose labels are its own tokens keeps them."""
    return Example(example.ids, label) if isinstance(example.label, int) else example
