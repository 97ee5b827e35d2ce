"""What a tokenizer does to text of each language, and tokenizers side by side.

- bytes a token: how much UTF-8 text a token stands for; more means shorter rows, cheaper training and longer contexts
- tokens a unit ("fertility"): tokens for each word or unspaced character; 1 is a token a word
- unknown share: of all tokens, those that stand for text which the tokenizer cannot spell
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge.core.artifact import Artifact, sha256_of
from fledge.core.job import Job
from fledge.core.language import t
from fledge.data.texts import units
from fledge.data.tokens.packing import encode_plain
from fledge.data.tokens.tokenizer import sample_texts

KNOWN = {
    "gpt2": ("openai-community/gpt2", "gpt2"),
    "qwen": ("Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"),
}
"""Repositories in which well-known tokenizers are found, where the Hugging Face cache holds them."""
REPORT = "report.json"


def measured(tokenizer: Any, by_language: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """`vocabulary`, and for each language of some texts what the head of this module says."""
    unknown = _unknown_id(tokenizer)
    languages = {}
    for language, texts in by_language.items():
        size = sum(len(text.encode()) for text in texts)
        pieces = sum(len(units(text)) for text in texts)
        tokens = unknowns = 0
        for ids in encode_plain(tokenizer, texts):
            tokens += len(ids)
            unknowns += ids.count(unknown) if unknown is not None else 0
        languages[language or "und"] = {
            "bytes": size, "units": pieces, "tokens": tokens, "bytes_per_token": round(size / max(1, tokens), 3),
            "tokens_per_unit": round(tokens / max(1, pieces), 3), "unknown_share": round(unknowns / max(1, tokens), 6),
        }  # fmt: skip
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return {"vocabulary": backend.get_vocab_size(), "languages": languages}


def _unknown_id(tokenizer: Any) -> int | None:
    """The id that stands for what cannot be spelled. With bytes to fall back to it never occurs."""
    model = json.loads(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    named = model.get("unk_token")
    return model["vocab"].get(named) if named and isinstance(model["vocab"], dict) else None


def report(named: Mapping[str, Path], data: Sequence[Artifact], sample: int, cached: bool, job: Job) -> dict[str, Any]:
    """Measure the tokenizers of some folders on the same sample; write `report.json`. Returns bytes a token."""
    from tokenizers import Tokenizer

    folders = {**(dict(known()) if cached else {}), **named}
    some, found = sample_texts(data, sample).by_language, {}
    for number, (name, folder) in enumerate(folders.items()):
        job.events.progress(number, len(folders), "tokenizers")
        file = folder / "tokenizer.json"
        found[name] = {**measured(Tokenizer.from_file(str(file)), some), "sha256": sha256_of(file)}
    write_report(job.out, found)
    rates = {
        name: {language: entry["bytes_per_token"] for language, entry in one["languages"].items()}
        for name, one in found.items()
    }
    for name, rate in rates.items():
        said = ", ".join(f"{language} {value:.2f}" for language, value in rate.items())
        job.events.message(t("{name}: bytes a token {rates}", name=name, rates=said))
    return {"bytes_per_token": rates, "tokenizers": len(found)}


def known() -> Iterator[tuple[str, Path]]:
    """The well-known tokenizers that this machine's Hugging Face cache holds; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for name, repositories in KNOWN.items():
        for repository in repositories:
            file = try_to_load_from_cache(repository, "tokenizer.json")
            if isinstance(file, (str, os.PathLike)):
                yield name, Path(file).parent
                break


def write_report(folder: Path, found: Mapping[str, Any]) -> None:
    """`report.json`: name → what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    (folder / REPORT).write_text(text, encoding="utf-8")
