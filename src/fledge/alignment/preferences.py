"""Preference pairs with a known better side.

1. A person's reply (chosen) over what the model says in the same place (rejected): of a few samples, the one nearest
   to the reply in length.
2. Dictionary text (chosen) over the same text spoilt, or over another entry's (rejected; see `corrupt`).

A reward model must not get by with length. Replies and samples share one range of tokens; a sample that its budget
cut off is set aside, since an answer without an end would give it away; and pairs are then evened out: in every band
of the ratio of lengths as many pairs stay whose chosen answer is the longer as pairs whose rejected one is, within each
part, language and kind. "The longer answer" is then right half of the time, held-out pairs included.

Pairs are held out by conversation, and a training pair whose prompt also stands in a held-out pair goes. Whatever goes
is kept in `rejected/` of the training part with its reason. Replies on which the model was fine-tuned are likelier to
it than others: the baseline "what the model finds likelier" is fair only on conversations that it has not seen.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any, cast

from fledge.alignment.contexts import Reply, lottery, one_each
from fledge.alignment.corrupt import corrupt, nearest
from fledge.alignment.samples import Sample, answering, sample_all
from fledge.core.errors import FledgeError, Problem
from fledge.core.job import Job
from fledge.core.language import t
from fledge.data.texts import units
from fledge.inference.engine import Engine, Request
from fledge.records.kinds import Answer, Conversation, Preference, to_row
from fledge.records.rejects import Rejects
from fledge.records.shards import ShardWriter, read

if TYPE_CHECKING:
    from fledge.alignment.stages import PreferencePairs as Settings

BAND = 0.5  # log2 of the ratio of lengths
_STEP = "preferences"


def make_preferences(settings: Settings, job: Job) -> dict[str, dict[str, Any]]:
    """Everything: choose, sample, spoil, split, even out, write. The metrics of both parts, and of the whole."""
    seed = job.rng_seed("preferences")
    rows = [cast(Conversation, row) for row in read(job.open(settings.conversations), "conversations")]
    people, dictionary = by_source(rows, settings.dictionary_sources)
    if settings.dictionary:
        dictionary += [cast(Conversation, row) for row in read(job.open(settings.dictionary), "conversations")]
    with Rejects(job.out / "train") as rejects:
        pairs = sampled_pairs(people, settings, job, seed, rejects) if settings.samples else []
        pairs += dictionary_pairs(dictionary, settings, seed, rejects)
        parts = in_parts(pairs, settings.held_out, seed, rejects)
        if settings.even_lengths:
            parts = {name: evened_out(some, seed, rejects) for name, some in parts.items()}
        metrics = write_parts(parts, job)
        reasons = rejects.reasons.get(_STEP, {})
    metrics["train"] |= {"prompts_sampled": min(settings.samples, len(people)), "rejected": reasons}
    return metrics


@dataclass(frozen=True)
class Pair:
    """A preference before it is sorted into its part."""

    reply: Reply
    preference: Preference

    @property
    def kind(self) -> str:
        """`person>model`, `dictionary>shuffle`, …"""
        return self.preference.meta["kind"]

    @property
    def lean(self) -> float:
        """log2 of chosen length over rejected length, in characters."""
        chosen, rejected = self.preference.answers
        return math.log2(max(1, len(chosen.content)) / max(1, len(rejected.content)))


def by_source(rows: Iterable[Conversation], patterns: Sequence[str]) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations of people, and those whose source says that they are dictionary text."""
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for row in rows:
        sides[any(fnmatch(row.source, pattern) for pattern in patterns)].append(row)
    return sides


def chosen_replies(people: Iterable[Conversation], engine: Engine, settings: Settings, seed: int) -> list[Reply]:
    """The replies to be compared with samples: of the right length, in a context that the model can read."""

    def fits(reply: Reply) -> bool:
        if not settings.min_tokens <= len(engine.encode(reply.text)) < settings.max_new_tokens:
            return False
        prompt = sum(len(engine.encode(message.content)) + 8 for message in reply.prompt(settings.turns))
        return prompt + 8 + settings.max_new_tokens <= engine.context

    return list(islice(one_each(people, seed, fits), settings.samples))


def sampled_pairs(
    people: Sequence[Conversation], settings: Settings, job: Job, seed: int, rejects: Rejects
) -> list[Pair]:
    """The pairs of people's replies and the model's samples."""
    with answering(job.open(settings.model).path, settings.dtype, job.execution.device) as engine:
        replies = chosen_replies(people, engine, settings, seed)
        flops = 2 * engine.parameters
        samples = sample_all(engine, requests_for(replies, settings, job), job.work, job.events, flops)
        for reply, some in list(zip(replies, samples, strict=True))[:3]:
            job.events.sample(reply.prompt(settings.turns)[-1].content, some[0].text)
        return person_pairs(replies, samples, engine, settings, rejects)


def requests_for(replies: Sequence[Reply], settings: Settings, job: Job) -> list[Request]:
    """What to ask the model: the same contexts, each with a seed of its own."""
    return [
        Request(
            messages=reply.prompt(settings.turns), max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature, top_p=settings.top_p, n=settings.candidates,
            seed=job.rng_seed("sample", reply.key),
        )
        for reply in replies
    ]  # fmt: skip


def person_pairs(
    replies: Sequence[Reply], samples: Sequence[Sequence[Sample]], engine: Engine, settings: Settings, rejects: Rejects
) -> list[Pair]:
    """A person's reply over the sample nearest to it in length; samples that give themselves away are set aside."""
    pairs = []
    for reply, some in zip(replies, samples, strict=True):
        reasons = {sample: fault(sample, reply, engine, settings.min_tokens) for sample in some}
        good = [sample for sample in some if not reasons[sample]]
        if good:
            best = min(good, key=lambda sample: abs(math.log(len(sample.text) / len(reply.text))))
            pairs.append(_pair(reply, settings.turns, "person", "model", best.text))
        else:
            rejects.add(_STEP, reasons[some[0]], str(some[0].tokens), some[0].text, reply.key)
    return pairs


def fault(sample: Sample, reply: Reply, engine: Engine, min_tokens: int) -> str:
    """Why a sample cannot stand against the reply, or nothing."""
    if not sample.text:
        return "the sample is empty"
    if not sample.finished:
        return "the sample has no end within its budget"
    if sample.text == reply.text:
        return "the sample is what the person said"
    return "the sample is too short" if len(engine.encode(sample.text)) < min_tokens else ""


def dictionary_pairs(rows: Sequence[Conversation], settings: Settings, seed: int, rejects: Rejects) -> list[Pair]:
    """Dictionary text over a spoilt one, the ways to spoil it taking turns."""
    kinds = list(settings.corruption)
    if not kinds:
        return []
    long_enough = one_each(rows, seed, lambda reply: len(units(reply.text)) >= settings.min_tokens)
    found = list(islice(long_enough, settings.dictionary_pairs))
    by_length: dict[tuple[int, str], list[str]] = defaultdict(list)
    for reply in found:
        by_length[reply.index, reply.conversation.language].append(reply.text)
    for texts in by_length.values():
        texts.sort(key=lambda text: (len(text), text))
    pairs = []
    for number, reply in enumerate(found):
        first = number % len(kinds)
        rng = Random(lottery(seed, "spoil", reply.key))
        for kind in kinds[first:] + kinds[:first]:
            near = by_length[reply.index, reply.conversation.language]
            spoilt = nearest(reply.text, near, rng) if kind == "swap" else corrupt(reply.text, kind, rng)
            if spoilt is not None:
                pairs.append(_pair(reply, settings.turns, "dictionary", f"corruption:{kind}", spoilt))
                break
        else:
            rejects.add(_STEP, "too short to be spoilt", "", reply.text, reply.key)
    return pairs


def _pair(reply: Reply, turns: int, better: str, worse: str, rejected: str) -> Pair:
    conversation = reply.conversation
    meta = {"kind": f"{better}>{worse.removeprefix('corruption:')}", "conversation": conversation.id}
    answers = (Answer(reply.text, 1, better), Answer(rejected, 2, worse))
    return Pair(
        reply,
        Preference(reply.prompt(turns), answers, reply.key, conversation.language, conversation.source, meta),
    )


def in_parts(pairs: Sequence[Pair], held_out: float, seed: int, rejects: Rejects) -> dict[str, list[Pair]]:
    """`train` and `held_out`: by conversation, and no prompt in both."""
    parts: dict[str, list[Pair]] = {"train": [], "held_out": []}
    for pair in pairs:
        drawn = int(lottery(seed, "part", pair.reply.conversation.id), 16) / 16**16
        parts["held_out" if drawn < held_out else "train"].append(pair)
    known = {pair.preference.prompt for pair in parts["held_out"]}
    for pair in (pair for pair in parts["train"] if pair.preference.prompt in known):
        rejects.add(_STEP, "the prompt is held out", "", _row(pair), pair.reply.key)
    parts["train"] = [pair for pair in parts["train"] if pair.preference.prompt not in known]
    return parts


def evened_out(pairs: Sequence[Pair], seed: int, rejects: Rejects) -> list[Pair]:
    """The pairs without the surplus: in every band of length ratios, language and kind as many lean to either side."""
    groups: dict[tuple[str, str, int], tuple[list[Pair], list[Pair]]] = defaultdict(lambda: ([], []))
    kept = {pair.reply.key for pair in pairs if pair.lean == 0}
    for pair in sorted(pairs, key=lambda pair: lottery(seed, "even", pair.reply.key)):
        if pair.lean != 0:
            group = pair.preference.language, pair.kind.partition(">")[0], min(6, int(abs(pair.lean) / BAND))
            groups[group][pair.lean > 0].append(pair)
    for _, (shorter, longer) in sorted(groups.items(), key=lambda item: item[0]):
        share = min(len(shorter), len(longer))
        kept |= {pair.reply.key for pair in shorter[:share] + longer[:share]}
        for pair in shorter[share:] + longer[share:]:
            rejects.add(_STEP, "surplus of one side's longer answers", f"{pair.lean:+.2f}", _row(pair), pair.reply.key)
    return [pair for pair in pairs if pair.reply.key in kept]


def _row(pair: Pair) -> str:
    return json.dumps(to_row(pair.preference), ensure_ascii=False)


def write_parts(parts: dict[str, list[Pair]], job: Job) -> dict[str, dict[str, Any]]:
    """Both parts as shards; what there is to know about each. Raises FledgeError where a part is empty."""
    metrics = {}
    for name, pairs in parts.items():
        if not pairs:
            raise FledgeError(
                Problem(
                    t("no preference pairs came out"), found=name,
                    fix=t("give more conversations or samples, or a larger held_out share; rejected/ has the reasons"),
                )
            )  # fmt: skip
        with ShardWriter(job.out / name, "preferences") as out:
            for pair in pairs:
                out.write(pair.preference)
        metrics[name] = measured(pairs)
    return metrics


def measured(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Counts, mean lengths in characters, and how often the longer answer is the chosen one (ties count one half)."""
    answers = [pair.preference.answers for pair in pairs]
    wins = sum(0.5 if pair.lean == 0 else float(pair.lean > 0) for pair in pairs)
    return {
        "pairs": len(pairs),
        "by_kind": dict(sorted(Counter(pair.kind for pair in pairs).items())),
        "by_language": dict(sorted(Counter(pair.preference.language or "und" for pair in pairs).items())),
        "characters_chosen": round(sum(len(chosen.content) for chosen, _ in answers) / len(pairs), 1),
        "characters_rejected": round(sum(len(rejected.content) for _, rejected in answers) / len(pairs), 1),
        "longer_answer_accuracy": round(wins / len(pairs), 4),
    }
