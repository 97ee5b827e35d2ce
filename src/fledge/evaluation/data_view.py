"""What happened to the data, stage by stage: how much came in, what was refused and why, what was masked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fledge.core.units import show_bytes, show_count, show_seconds
from fledge.evaluation.bilingual import Both, language_name, plain, say
from fledge.evaluation.run_view import RunView, StageView

_STAGES = ("data.", "tokenizer.", "align.")
_EXAMPLES, _CHARACTERS, _ROWS_READ = 2, 280, 5000


@dataclass(frozen=True)
class Refused:
    """What one step of the refinery refused."""

    step: str
    rows: int
    reasons: list[tuple[str, int]]


@dataclass(frozen=True)
class Example:
    """A refused row, shortened."""

    step: str
    reason: str
    value: str
    text: str


@dataclass(frozen=True)
class DataCard:
    """One stage that makes data (or a tokenizer)."""

    stage: StageView
    rows_in: int = 0
    rows_out: int = 0
    refused: list[Refused] = field(default_factory=list)
    facts: list[tuple[Both, Both]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """Per cent of the rows."""
        return 100 * self.rows_out / self.rows_in if self.rows_in else 100.0

    def share(self, rows: int) -> float:
        """Per cent of all rows that came in."""
        return 100 * rows / self.rows_in if self.rows_in else 0.0


def data_cards(run: RunView) -> Iterator[DataCard]:
    """A card for every finished stage that makes data."""
    for stage in run.stages:
        if stage.done and stage.use.startswith(_STAGES):
            yield _card(stage)


def _card(stage: StageView) -> DataCard:
    metrics = once(stage.metrics)
    rejected = metrics.pop("rejected", None)
    reasons = rejected if isinstance(rejected, Mapping) else {}
    refused = [
        Refused(step, sum(_counts(by).values()), sorted(_counts(by).items(), key=lambda item: -item[1]))
        for step, by in sorted(reasons.items(), key=lambda item: _place(item[0], stage))
    ]
    rows_out = int(metrics.pop("rows_out", 0) or metrics.get("rows", 0) or 0)
    rows_in = int(metrics.pop("rows_in", 0) or (rows_out + sum(step.rows for step in refused) if refused else 0))
    return DataCard(stage, rows_in, rows_out, refused, list(facts_of(metrics)), list(_examples(stage)))


def _place(step: str, stage: StageView) -> int:
    """When the step had its turn: its place in the stage's list of steps, behind them when it is not there."""
    steps = stage.settings.get("steps") or []
    names = [next(iter(entry)) if isinstance(entry, Mapping) else entry for entry in steps]
    return names.index(step) if step in names else len(names)


def once(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a stage; where all its outputs say the same, they say it once."""
    parts = list(metrics.values())
    if len(parts) > 1 and isinstance(parts[0], Mapping) and all(part == parts[0] for part in parts):
        return dict(parts[0])
    return dict(metrics)


def _counts(reasons: Any) -> dict[str, int]:
    """{reason: rows}; a bare number where a step has one reason only."""
    return {str(k): int(v) for k, v in reasons.items()} if isinstance(reasons, Mapping) else {"": int(reasons)}


_HIDDEN = ("seconds", "bytes_per_second", "rows_per_second", "shape", "skipped_", "dropped_")


def facts_of(metrics: Mapping[str, Any], of: Both | None = None) -> Iterator[tuple[Both, Both]]:
    """Numbers as (name, text); tables as one line; the parts of a split each with its name before."""
    for key, value in metrics.items():
        if key.startswith(_HIDDEN) or _part_of(key, metrics):
            continue
        title = humanise(key) if of is None else Both(f"{of.en}: {humanise(key).en}", f"{of.zh}：{humanise(key).zh}")
        if isinstance(value, Mapping) and value and all(isinstance(v, (int, float)) for v in value.values()):
            yield title, _listed(key, value)
        elif isinstance(value, Mapping) and of is None:
            yield from facts_of(value, humanise(key))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
            interval = "" if low is None or high is None else f" ({shown(key, low)}–{shown(key, high)})"
            yield title, plain(shown(key, value) + interval)


def _part_of(key: str, metrics: Mapping[str, Any]) -> bool:
    """Whether the number stands with another one already: its interval, or the same by language."""
    base, _, last = key.rpartition("_")
    return last in ("low", "high", "en", "zh") and base in metrics


def _listed(key: str, numbers: Mapping[str, float]) -> Both:
    """`English 6,180 · Chinese 2,450`, each number in the unit of the outer or the inner name."""
    names = {
        k: language_name(k) if k in ("en", "zh") else humanise(str(k).removeprefix("package:") or "—") for k in numbers
    }
    texts = {k: shown(f"{key} {k}", number) for k, number in numbers.items()}
    return Both(*(" · ".join(f"{getattr(names[k], lang)} {texts[k]}" for k in numbers) for lang in ("en", "zh")))


def shown(key: str, value: float) -> str:
    """A number in the unit that its name says."""
    if "bytes" in key and "per" not in key:
        return show_bytes(value)
    if "seconds" in key:
        return show_seconds(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}" if abs(value) < 1e6 else show_count(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def humanise(key: str) -> Both:
    """`rows_by_language` → rows by language; known names in both languages."""
    known = {
        "rows": say("rows"),
        "bytes": say("bytes"),
        "tokens": say("tokens"),
        "rows_by_language": say("rows by language"),
        "bytes_by_language": say("bytes by language"),
        "rows_by_source": say("rows by source"),
        "bytes_by_source": say("bytes by source"),
        "bytes_in": say("bytes in"),
        "bytes_out": say("bytes out"),
        "pii": say("personal data masked"),
        "notes": say("noted"),
        "train": say("training part"),
        "held_out": say("held-out part"),
        "train_rows": say("rows to train on"),
        "train_bytes": say("bytes to train on"),
        "held_out_rows": say("rows held out"),
        "held_out_bytes": say("bytes held out"),
        "held_out_target": say("wanted"),
        "removed": say("near-copies taken out"),
        "removed_bytes": say("bytes taken out"),
        "vocabulary": say("vocabulary"),
        "trained_on_bytes": say("bytes read"),
        "bytes_per_token": say("bytes a token"),
        "steps": say("steps"),
        "final_loss": say("loss at the end"),
        "tokens_per_second": say("tokens a second"),
        "answer_loss_before": say("answer loss before"),
        "answer_loss": say("answer loss"),
        "epochs": say("epochs"),
        "pairs": say("pairs"),
        "accuracy": say("held-out accuracy"),
        "held_out_pairs": say("held-out pairs"),
        "held_out_tokens": say("held-out tokens"),
        "held_out_margin": say("held-out margin"),
        "by_kind": say("by kind"),
        "by_language": say("by language"),
        "characters_chosen": say("characters, preferred answers"),
        "characters_rejected": say("characters, other answers"),
        "longer_answer_accuracy": say("the longer answer right"),
        "prompts_sampled": say("prompts sampled"),
        "rejected": say("refused"),
        "longer": say("the longer answer right"),
        "likelier": say("the likelier answer right"),
        "likelier_mean": say("the likelier answer right, per token"),
        "parameters": say("parameters"),
        "trained_parameters": say("trained parameters"),
        "mfu": say("model FLOPs utilisation, per cent"),
        "matrix_rate": say("matrix rate of the machine, operations a second"),
        "rollbacks": say("returns to a checkpoint"),
        "text_bytes": say("bytes of text"),
        "corpus_tokens": say("tokens of the corpus"),
        "best_held_out_loss": say("best loss, held out"),
        "best_step": say("its step"),
    }
    return known.get(key) or plain(key.replace("_", " "))


def _examples(stage: StageView) -> Iterator[Example]:
    """Up to two refused rows of every step and reason."""
    from fledge.records.rejects import REJECTED, read_rejects

    folders = [f for name in stage.outputs or {"": None} if (f := stage.folder(name)) and (f / REJECTED).is_dir()]
    seen: dict[tuple[str, str], int] = {}
    for folder in dict.fromkeys(folders):
        for number, row in enumerate(read_rejects(Path(folder))):
            if number > _ROWS_READ:
                return
            key = (row["step"], row["reason"])
            seen[key] = seen.get(key, 0) + 1
            if seen[key] <= _EXAMPLES:
                yield Example(row["step"], row["reason"], row["value"], shorten(readable(row["row"])))


def readable(row: str) -> str:
    """The texts in a row of JSON; the row itself where it is not JSON."""
    try:
        value = json.loads(row)
    except ValueError:
        return row
    if not isinstance(value, Mapping):
        return row
    if "text" in value:
        return str(value["text"])
    turns = value.get("messages") or value.get("prompt") or []
    return "\n".join(str(turn.get("content", "")) for turn in turns if isinstance(turn, Mapping)) or row


def shorten(text: str, limit: int = _CHARACTERS) -> str:
    """The beginning, with an ellipsis where something is left out."""
    text = text.strip()
    return text if len(text) <= limit else text[:limit].rstrip() + " …"
