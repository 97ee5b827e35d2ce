"""What a model answers to many prompts, kept in chunks, so that a killed run goes on where it was.

Every request carries the seed of its own prompt, and a chunk always enters an idle engine whole: its batches, and with
them the last bits of its logits, are the same however often the run was interrupted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fledge.core.artifact import write_atomic
from fledge.core.events import Emitter
from fledge.inference.engine import Engine, Request, Result

if TYPE_CHECKING:
    from fledge.inference.native import NativeEngine

CHUNK = 256
SMALL = 20e6
"""Parameters below which a second thread costs more than it brings (and, on a busy machine, twenty times more)."""


@dataclass(frozen=True)
class Sample:
    """A sampled answer; `finished` when the model ended it by itself."""

    text: str
    finished: bool
    tokens: int


@contextmanager
def answering(path: Path, dtype: str, device: str) -> Iterator[NativeEngine]:
    """An engine for the model in `path`, closed in the end; small models answer on one thread."""
    import torch

    from fledge.inference.native import NativeEngine

    threads = torch.get_num_threads()
    engine = NativeEngine.from_folder(path, dtype, device)
    try:
        if engine.parameters < SMALL:
            torch.set_num_threads(1)  # the engine's own thread starts with the first request and takes this over
        yield engine
    finally:
        engine.close()
        torch.set_num_threads(threads)


def sample_all(
    engine: Engine, requests: Sequence[Request], work: Path, events: Emitter, flops: float
) -> list[list[Sample]]:
    """The `n` answers to every request, in order. `flops` a token, of the model: to tell how fast this machine is."""
    samples: list[list[Sample]] = []
    tokens, seconds = 0, 0.0
    for start in range(0, len(requests), CHUNK):
        file = work / f"samples-{start // CHUNK:05d}.json"
        if not file.exists():
            began = time.monotonic()
            made = [_samples(result) for result in engine.generate(requests[start : start + CHUNK])]
            seconds += time.monotonic() - began
            tokens += sum(sample.tokens for some in made for sample in some)
            write_atomic(file, json.dumps([[asdict(s) for s in some] for some in made], ensure_ascii=False))
        samples += [[Sample(**row) for row in rows] for rows in json.loads(file.read_text(encoding="utf-8"))]
        events.progress(len(samples), len(requests), "prompts")
    if seconds > 1:
        events.metric("rate/generate.flops", tokens * flops / seconds)
    return samples


def _samples(result: Result) -> list[Sample]:
    if result.error is not None:
        raise result.error
    return [Sample(c.text.strip(), c.finish_reason == "stop", len(c.token_ids)) for c in result.choices]
