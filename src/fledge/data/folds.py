"""Folds: every record held out once, what training would already know of it taken out again.

Groups of records go, in the order of a seeded hash, to the fold that has the least of their language (stratified: of
their label in their language). Of fold k everything in it is held out, cleaned as `split.py` cleans, and everything
outside it is trained on.

In order of time there is one block more than folds, of about equal size, the earliest first: fold k is trained on the
first k blocks and held out is the one after them, so that nothing is measured on what came before its training. What
has no date stands in the first block.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.data.split import Candidate, Index, Splitter, write_cleaned, write_part
from fledge.records.kinds import Record


class Folds:
    """`count` folds of what a splitter reads. Raises FledgeError where there are too few groups for them."""

    def __init__(self, splitter: Splitter, count: int) -> None:
        self.splitter, self.count = splitter, count
        self.ordered = bool(splitter.arrangement.time)
        self.fold = self._blocks() if self.ordered else self._dealt()
        blocks = count + self.ordered
        if len(set(self.fold.values())) < blocks:
            raise FledgeError(
                Problem(
                    t("there are too few groups of records for so many folds"), where="folds", found=str(count),
                    allowed=t("at most {value}", value=len(self.fold) - self.ordered),
                )
            )  # fmt: skip

    def _dealt(self) -> dict[str, int]:
        """Group → fold, 0 … count − 1: each stratum's groups in their order, to the fold that has the least of it."""
        fold, whole = {}, Counter[int]()
        for groups in (self.splitter.order[stratum] for stratum in sorted(self.splitter.order)):
            own = Counter[int]()
            for group in groups:
                place = min(range(self.count), key=lambda k: (own[k], whole[k], k))
                fold[group] = place
                own[place] += self.splitter.size[group]
                whole[place] += self.splitter.size[group]
        return fold

    def _blocks(self) -> dict[str, int]:
        """Group → block, 0 … count, from the earliest date on; as equal in bytes, in every stratum, as groups allow."""
        fold = dict.fromkeys(self.splitter.size, 0)
        for stratum, groups in self.splitter.order.items():
            done = 0
            for group in reversed(groups):  # the splitter's order begins with the latest
                middle = done + self.splitter.size[group] / 2
                fold[group] = min(self.count, int(middle * (self.count + 1) / max(1, self.splitter.total[stratum])))
                done += self.splitter.size[group]
        return fold

    def held_out(self, number: int) -> int:
        """The block that fold `number` (from 1) holds out."""
        return number if self.ordered else number - 1

    def trains_on(self, number: int, block: int) -> bool:
        """Whether fold `number` (from 1) is trained on a block."""
        return block < number if self.ordered else block != number - 1

    def write(self, kind: str, out: Path) -> dict[str, Any]:
        """Write, for k = 1 … count, `out/k`, the records held out, and `out/train_k`. Returns the metrics."""
        metrics: dict[str, Any] = {}
        for number in range(1, self.count + 1):
            candidates = [
                Candidate.of(record, group)
                for record, group, block in self._records()
                if block == self.held_out(number)
            ]
            candidates.sort(key=lambda candidate: candidate.record.id)
            index = Index(candidates)
            seen = index.nothing_seen()

            def training(number: int = number, index: Index = index, seen: Any = seen) -> Iterator[Record]:
                for record, _, block in self._records():
                    if self.trains_on(number, block):
                        index.see(record, seen)
                        yield record

            found = write_part(kind, out / f"train_{number}", training(), "train")
            cleaned = [(candidate, index.clean(candidate, i, seen)) for i, candidate in enumerate(candidates)]
            found |= write_cleaned(kind, out / str(number), cleaned, "held_out")
            metrics[str(number)] = found | self._dates(number)
        return {"folds": metrics, **self.splitter.undated_rows(), "strata": self._strata()}

    def _records(self) -> Iterator[tuple[Record, str, int]]:
        for record in self.splitter.records():
            group = self.splitter.arrangement.group(record)
            yield record, group, self.fold[group]

    def _dates(self, number: int) -> dict[str, str]:
        """The first and the last date of what a fold holds out, in order of time."""
        dates = [
            date for group, date in self.splitter.dates.items() if date and self.fold[group] == self.held_out(number)
        ]
        return {"from": min(dates), "to": max(dates)} if self.ordered and dates else {}

    def _strata(self) -> dict[str, list[int]]:
        """Bytes of every stratum in each block."""
        table: dict[str, list[int]] = defaultdict(lambda: [0] * (self.count + self.ordered))
        for stratum, groups in sorted(self.splitter.order.items()):
            for group in groups:
                table[stratum][self.fold[group]] += self.splitter.size[group]
        return dict(table)
