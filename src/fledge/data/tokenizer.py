"""Training a tokenizer: byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) for English and Chinese alike.

Text is first cut by Qwen2's pattern: words with the space before them, runs of Han characters, single digits,
punctuation. llama.cpp knows that pattern (`tokenizer.ggml.pre = "qwen2"`), so that an exported model reads text as the
original does. No text is unknown, none is changed: decoding gives back exactly what was encoded.

BPE training is a matter of counts, and repeats bit for bit; Unigram and WordPiece training of the same library do
not, which is why they are not offered.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fledge.records
from fledge.core.artifact import Artifact
from fledge.data.ngrams import hash64
from fledge.data.packing import encode_plain
from fledge.records.kinds import texts
from fledge.records.shards import kind_in, read

END_OF_TEXT, START, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = (END_OF_TEXT, START, END, PAD)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MEASURED = 2_000_000  # bytes of each language on which bytes per token are measured


@dataclass(frozen=True)
class Sample:
    """Texts to train on, and some of each language to measure on."""

    texts: list[str]
    by_language: dict[str, list[str]]
    bytes: int


def sample_texts(data: Iterable[Artifact], limit: int) -> Sample:
    """About `limit` bytes of text, from every input in proportion to its size.

    A text is taken by its hash, and the texts are sorted: the order of inputs and rows changes nothing.
    """
    found: list[tuple[str, str]] = []
    for artifact in data:
        for record in read(artifact, kind_in(artifact)):
            found += [(record.language, text) for text in texts(record) if text]
    share = limit / max(1, sum(len(text.encode()) for _, text in found))
    taken = sorted(item for item in found if share >= 1 or hash64(item[1]) < share * 2**64)
    by_language: dict[str, list[str]] = {}
    sizes: Counter[str] = Counter()
    for language, text in sorted(taken, key=lambda item: (hash64(item[1]), item)):
        if sizes[language] < _MEASURED:
            by_language.setdefault(language, []).append(text)
            sizes[language] += len(text.encode())
    return Sample(
        [text for _, text in taken], dict(sorted(by_language.items())), sum(len(text.encode()) for _, text in taken)
    )


def train_bpe(corpus: Iterable[str], vocab_size: int) -> Any:
    """A `tokenizers.Tokenizer` with the four special tokens as ids 0 to 3, the 256 bytes, and merges.

    Where the text has too few different pairs the vocabulary stays smaller than `vocab_size`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The folder that `AutoTokenizer.from_pretrained` loads, our chat template in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT, "bos_token": None, "unk_token": None, "pad_token": PAD,
        "additional_special_tokens": [START, END],
        "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right", "truncation_side": "right", "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    template = Path(fledge.records.__file__).parent / "templates" / "chatml.jinja"
    shutil.copyfile(template, folder / "chat_template.jinja")


def bytes_per_token(tokenizer: Any, some: Iterable[str]) -> float:
    """UTF-8 bytes a token, over some texts."""
    measured = list(some)
    tokens = sum(map(len, encode_plain(tokenizer, measured)))
    return sum(len(text.encode()) for text in measured) / max(1, tokens)


def train_tokenizer(data: Iterable[Artifact], vocab_size: int, sample: int, out: Path) -> dict[str, Any]:
    """Train on a sample of the data, save below `out`, measure. Returns the metrics."""
    some = sample_texts(data, sample)
    tokenizer = train_bpe(some.texts, vocab_size)
    save_tokenizer(tokenizer, out)
    rates = {language or "und": round(bytes_per_token(tokenizer, t), 3) for language, t in some.by_language.items()}
    return {"vocabulary": tokenizer.get_vocab_size(), "trained_on_bytes": some.bytes, "bytes_per_token": rates}
