"""A byte-level BPE tokenizer in GGUF's words: tokens, their types, merges, special ids, the chat template.

GGUF keeps no pre-tokenizer, only the name of one that its readers know; a tokenizer that splits text in another way
is refused, because its readers would cut other tokens without a word. Readers that are given no beginning of text
assume id 11, so one is always named and `add_bos_token` says that it is not written by itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
_GENERATION = re.compile(r"\{%(?P<left>[-+]?)\s*(?P<tag>(?:end)?)generation\s*(?P<right>[-+]?)%\}")
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer. `special` are ids by the name of their role."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre: str
    special: dict[str, int]
    add_bos: bool
    template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for role, add in (
            ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("eot", writer.add_eot_token_id),
            ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id),
        ):  # fmt: skip
            if role in self.special:
                add(self.special[role])
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_space_prefix(False)
        if self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of the tokenizer in `folder`, filled up to the model's `size`. Raises FledgeError where GGUF has
    no words for it."""
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, where = saved["model"], str(folder / "tokenizer.json")
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("unk_token") in model["vocab"]:
        raise _refused(where, model["type"], "byte-level BPE")
    pre = pre_tokenizer_name(saved, where)
    tokens, types = _filled(saved, size)
    return Vocabulary(
        tokens, types, [m if isinstance(m, str) else " ".join(m) for m in model["merges"]], pre,
        _special_ids(tokenizer), _adds_bos(tokenizer), _plain_template(tokenizer),
    )  # fmt: skip


def pre_tokenizer_name(saved: dict[str, Any], where: str = "") -> str:
    """llama.cpp's name for how tokenizer.json splits text. Raises FledgeError where it has none."""
    steps = saved.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    shape = [step.get("type") for step in steps]
    byte_level = steps[-1] if shape[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space") else {}
    whole_words = saved["model"].get("ignore_merges", False)  # only llama-bpe's readers know that
    name = None
    if shape == ["ByteLevel"] and byte_level.get("use_regex", True):
        name = "gpt-2"
    elif shape == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and byte_level.get("use_regex", True):
        name = "smollm"
    elif shape == ["Split", "ByteLevel"] and byte_level.get("use_regex") is False:
        name = _SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
    if name is None or not byte_level or (whole_words and name != "llama-bpe") or not _plain(saved, name):
        found = json.dumps(saved.get("pre_tokenizer"), ensure_ascii=False)
        raise _refused(where, found[:300], "gpt-2, smollm, llama-bpe, qwen2")
    return name


def _plain(saved: dict[str, Any], pre: str) -> bool:
    """Whether the text is split as it is (qwen2's composition of accents is left to its readers)."""
    normalizer = (saved.get("normalizer") or {}).get("type")
    return normalizer is None or (normalizer == "NFC" and pre == "qwen2")


def _refused(where: str, found: str, allowed: str) -> FledgeError:
    return FledgeError(Problem(t("this tokenizer cannot be written as GGUF"), where, found, allowed))


def _filled(saved: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Every id's token and its type; ids that no token has get a name nobody writes."""
    tokens = {i: (token, TokenType.NORMAL) for token, i in saved["model"]["vocab"].items()}
    for added in saved.get("added_tokens", []):
        tokens[added["id"]] = (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if beyond := [text for i, (text, _) in sorted(tokens.items()) if i >= size]:
        raise FledgeError(Problem(t("the tokenizer has tokens that the model has not"), found=listing(beyond)))
    rows = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    vocabulary = tokenizer.get_vocab()
    ids["eot"] = next((vocabulary[text] for text in END_OF_TURN if text in vocabulary), None)
    if ids["bos"] is None:
        ids["bos"] = ids["eos"]
    return {role: i for role, i in ids.items() if i is not None}


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    first: list[int] = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and first[0] == tokenizer.bos_token_id


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template with its generation tags as comments: they mark what is learned, render to nothing, and not
    every reader of GGUF knows them. White space is cut as before."""
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return template and _GENERATION.sub(r"{#\g<left> \g<tag>generation \g<right>#}", template)
