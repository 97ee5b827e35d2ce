"""Training a tokenizer for English and Chinese alike: byte-level BPE, Unigram or WordPiece.

- `bpe` (Sennrich et al., 2016; Radford et al., 2019): text is first cut by Qwen2's pattern: words with the space before
  them, runs of Han characters, single digits, punctuation. llama.cpp knows that pattern (`tokenizer.ggml.pre =
  "qwen2"`), so that an exported model reads text as the original does. No text is unknown, none is changed: decoding
  gives back exactly what was encoded.
- `unigram` (Kudo, 2018): the same cut, pieces of characters, and UTF-8 bytes for the characters that are too rare. No
  text is unknown, and decoding gives back what was encoded (after the normaliser, if there is one).
- `wordpiece` (Schuster and Nakajima, 2012; Devlin et al., 2019): words, punctuation, single digits and single Han
  characters; what follows inside a word begins with ##. White space is not kept, and rare characters are unknown.

All three repeat bit for bit. The `tokenizers` library alone does that for BPE only: its Unigram and WordPiece trainers
gave another `tokenizer.json` in each of four processes, single-threaded, from the same sorted text (Unigram other
scores; WordPiece another vocabulary), because they walk hash maps seeded by each process. Hence Unigram is trained by
`unigram`, and WordPiece by the library's BPE trainer with its alphabet, prefixed letters included, given in order.
"""

from __future__ import annotations

import json
import shutil
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fledge.records
from fledge.core.artifact import Artifact
from fledge.data.ngrams import hash64
from fledge.data.texts import UNSPACED
from fledge.data.tokens.packing import encode_plain
from fledge.records.kinds import texts
from fledge.records.shards import kind_in, read

if TYPE_CHECKING:
    from fledge.data.tokens.stages import TrainTokenizer

END_OF_TEXT, START, END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = (END_OF_TEXT, START, END, PAD)
MASK = "[MASK]"
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
MARKS = {  # what a pre-training objective needs: more special tokens, and what stands around a text
    "causal": ((), None),
    "masked": ((MASK,), f"{END_OF_TEXT} {{}} {END_OF_TEXT}"),
    "replaced_token": ((MASK,), f"{END_OF_TEXT} {{}} {END_OF_TEXT}"),
    "span_corruption": (SENTINELS, f"{{}} {END_OF_TEXT}"),
    "denoising": ((MASK,), f"{END_OF_TEXT} {{}} {END_OF_TEXT}"),
}
UNKNOWN = {"bpe": None, "unigram": "<unk>", "wordpiece": "[UNK]"}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MEASURED = 2_000_000  # bytes of each language on which bytes per token are measured
_COVERED = 0.9995  # of the characters of the text are in the alphabet of Unigram and WordPiece
_NEVER = -1e4  # the score of what no text may be cut into


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


# --- the three algorithms --------------------------------------------------------------------------------------------


def train_bpe(corpus: Iterable[str], vocab_size: int, normalizer: str = "none", extra: Sequence[str] = ()) -> Any:
    """A `tokenizers.Tokenizer` with the four special tokens as ids 0 to 3, the `extra` ones, the 256 bytes, and merges.

    Where the text has too few different pairs the vocabulary stays smaller than `vocab_size`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    _normalize(tokenizer, normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [_split(PATTERN), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[*SPECIAL, *extra], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def train_unigram_tokenizer(
    corpus: Iterable[str], vocab_size: int, normalizer: str = "none", extra: Sequence[str] = ()
) -> Any:
    """A `tokenizers.Tokenizer`: special tokens, `<unk>` (which never occurs), the 256 bytes, pieces by likelihood."""
    from tokenizers import Tokenizer, decoders, models

    from fledge.data.tokens.unigram import train_unigram

    tokenizer = Tokenizer(models.Unigram())
    _normalize(tokenizer, normalizer)
    tokenizer.pre_tokenizer = _split(PATTERN)
    words = _words(tokenizer, corpus)
    first = [*SPECIAL, *extra, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    room = vocab_size - len(first)
    pieces = train_unigram(words, room, _alphabet(words, room // 2)) if room else []
    vocabulary = [*((token, _NEVER) for token in first), *pieces]
    tokenizer.model = models.Unigram(vocabulary, first.index("<unk>"), True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    _add_special(tokenizer, [*SPECIAL, *extra, "<unk>"])
    return tokenizer


def train_wordpiece(corpus: Iterable[str], vocab_size: int, normalizer: str = "none", extra: Sequence[str] = ()) -> Any:
    """A `tokenizers.Tokenizer`: special tokens, `[UNK]`, characters, pieces of words in the order of their merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    corpus = list(corpus)
    trained = Tokenizer(models.BPE(continuing_subword_prefix="##"))
    _normalize(trained, normalizer)
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            _split(f"[{UNSPACED}]"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    words = _words(trained, corpus)
    first = [*SPECIAL, *extra, "[UNK]"]
    ascii_ = {*string.ascii_letters, *string.digits, *string.punctuation}
    kept = {*_alphabet(words, (vocab_size - len(first)) // 2), *ascii_}
    everything = [
        *sorted({*ascii_, *(character for word in words for character in word)}),
        *(f"##{c}" for c in sorted({*string.ascii_letters, *(c for word in words for c in word[1:])})),
    ]  # all that training meets, so that nothing gets its number by the order in which it is met
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + len(everything), min_frequency=2, special_tokens=[*first, *everything],
        show_progress=False, initial_alphabet=[], continuing_subword_prefix="##",
    )  # fmt: skip
    trained.train_from_iterator(corpus, trainer)
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])][len(first) :]
    pieces = [piece for piece in pieces if kept.issuperset(piece.removeprefix("##") or piece)]
    vocabulary = {piece: number for number, piece in enumerate([*first, *pieces][:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix="##"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    near = rf"[{UNSPACED}，。、！？：；（）《》“”]"
    together = Regex(rf"(?<={near}) | (?={near})")  # no space beside a Chinese character
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), decoders.Replace(together, "")]
    )
    _add_special(tokenizer, first)
    return tokenizer


TRAINERS = {"bpe": train_bpe, "unigram": train_unigram_tokenizer, "wordpiece": train_wordpiece}


def _split(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _normalize(tokenizer: Any, normalizer: str) -> None:
    from tokenizers import normalizers

    kinds = {
        "nfc": lambda: normalizers.NFC(),
        "nfkc": lambda: normalizers.NFKC(),
        "lowercase": lambda: normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    }
    if normalizer != "none":
        tokenizer.normalizer = kinds[normalizer]()


def _words(tokenizer: Any, corpus: Iterable[str]) -> Counter[str]:
    """What the tokenizer cuts text into before it looks for pieces, counted."""
    words: Counter[str] = Counter()
    for text in corpus:
        text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return words


def _alphabet(words: Counter[str], most: int) -> list[str]:
    """The most frequent characters, as many as cover nearly all of the text but at most so many, sorted."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    kept, covered, total = [], 0, counts.total()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(kept) >= most or covered >= _COVERED * total:
            break
        kept.append(character)
        covered += count
    return sorted(kept)


def _add_special(tokenizer: Any, tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])


# --- the folder ------------------------------------------------------------------------------------------------------


def save_tokenizer(
    tokenizer: Any, folder: Path, unknown: str | None = None, extra: Sequence[str] = (), objective: str = "causal"
) -> None:
    """The folder that `AutoTokenizer.from_pretrained` loads, our chat template in it.

    For an encoder or an encoder-decoder (see `MARKS`) texts get the end-of-text token around them, as in training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    around = MARKS[objective][1]
    if around:
        from tokenizers.processors import TemplateProcessing

        pair = f"{around.format('$A')} {around.format('$B').removeprefix(END_OF_TEXT).strip()}"
        ends = [(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
        tokenizer.post_processor = TemplateProcessing(around.format("$A"), pair, ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT, "bos_token": None, "unk_token": unknown, "pad_token": PAD,
        "additional_special_tokens": [START, END, *extra],
        "add_bos_token": False, "add_eos_token": False, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right", "truncation_side": "right", "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    if MASK in MARKS[objective][0]:
        config |= {"mask_token": MASK, "cls_token": END_OF_TEXT, "sep_token": END_OF_TEXT}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    template = Path(fledge.records.__file__).parent / "templates" / "chatml.jinja"
    shutil.copyfile(template, folder / "chat_template.jinja")


def bytes_per_token(tokenizer: Any, some: Iterable[str]) -> float:
    """UTF-8 bytes a token, over some texts."""
    measured = list(some)
    tokens = sum(map(len, encode_plain(tokenizer, measured)))
    return sum(len(text.encode()) for text in measured) / max(1, tokens)


def train_tokenizer(data: Iterable[Artifact], asked: TrainTokenizer, out: Path) -> dict[str, Any]:
    """Train on a sample of the data, save below `out` with a `report.json`. Returns the metrics."""
    from fledge.data.tokens.tokenizer_report import measured, write_report

    some = sample_texts(data, asked.sample)
    extra = [*MARKS[asked.objective][0], *asked.special_tokens]
    tokenizer = TRAINERS[asked.algorithm](some.texts, asked.vocab_size, asked.normalizer, extra)
    save_tokenizer(tokenizer, out, UNKNOWN[asked.algorithm], extra, asked.objective)
    found = measured(tokenizer, some.by_language)
    write_report(out, {"tokenizer": found})
    by_language = found["languages"]
    return {
        "vocabulary": tokenizer.get_vocab_size(), "trained_on_bytes": some.bytes,
        "bytes_per_token": {language: entry["bytes_per_token"] for language, entry in by_language.items()},
        "tokens_per_unit": {language: entry["tokens_per_unit"] for language, entry in by_language.items()},
        "unknown_share": {language: entry["unknown_share"] for language, entry in by_language.items()},
    }  # fmt: skip
