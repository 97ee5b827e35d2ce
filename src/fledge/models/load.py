"""Models and tokenizers from folders, safely: safetensors only, never a pickle, never remote code.

`load_model` reads what fledge writes and what others do: a full model in any transformers architecture (a decoder, an
encoder, an encoder-decoder, or one with a classification head), a PEFT adapter (with its base), a reward model (one
label), an int8 folder of compressed-tensors.

An adapter names its base by an absolute path in `adapter_config.json`, because that is what PEFT and transformers
resolve without us. When a store has been moved, that path is gone; since artifacts are neighbours in a store, the
folder of the same name beside the adapter is then taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.models.dropout import keys_of_config

Head = Literal["causal", "masked", "seq2seq", "discriminator", "sequence", "tokens", "body"]
HEADS: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "discriminator": AutoModelForPreTraining,
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "body": AutoModel,
}
"""What may stand on top of a model, and the class of transformers that finds the family's own."""

transformers_logging.disable_progress_bar()  # progress is told through events

ADAPTER_CONFIG = "adapter_config.json"
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` (or their short names) as a torch dtype."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise FledgeError(Problem(t("unknown number format"), found=name, allowed=listing(list(DTYPES))))
    return DTYPES[name]


def is_adapter(path: Path) -> bool:
    """Whether the folder is a PEFT adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def load_model(
    path: Path | str,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    reward: bool = False,
    trainable: bool = False,
    head: Head | None = None,
    labels: int | None = None,
    dropout: Mapping[str, float] | None = None,
) -> PreTrainedModel:
    """The model in `path`, in evaluation mode, without gradients unless `trainable`.

    An adapter comes with its base under it (a `PeftModel`). `head` says what stands on top (left out: what the folder
    was saved with); a classification head with `labels` outputs is new, and the same every time, where the folder has
    none. `reward=True` is a sequence head with one label. `dropout` is by part (`models/dropout.py`), where it is to
    differ from the folder's. Raises FledgeError for a folder that holds no model, no safetensors or not these weights.
    """
    folder = Path(path).resolve()
    if reward:
        head, labels = "sequence", 1
    if is_adapter(folder):
        model = _load_adapter(folder, dtype, device, trainable, head, labels, dropout)
    else:
        model = _load_full(folder, dtype, device, head, labels, dropout)
        model.requires_grad_(trainable)
    return model.eval()


def head_in(config: Any) -> Head:
    """What a folder was saved with, by the class that its config names; a decoder's head where it names none."""
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    for end, head in (
        ("ForSequenceClassification", "sequence"),
        ("ForTokenClassification", "tokens"),
        ("ForMaskedLM", "masked"),
    ):
        if name.endswith(end):
            return cast(Head, head)
    if config.is_encoder_decoder:
        return "seq2seq"
    if name.endswith("ForPreTraining"):
        return "discriminator" if config.model_type == "electra" else "masked"
    return "causal"


def context_of(config: Any) -> int:
    """The longest text that a model takes, in tokens; where nothing ends it, what it was trained on, else a million."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        if value := int(getattr(text, name, None) or 0):
            counts_on = text.model_type in ("roberta", "xlm-roberta", "camembert")  # from behind the padding id
            rope = getattr(text, "rope_parameters", None) or {}
            stretched = float(rope.get("factor") or 1) if rope.get("rope_type") == "dynamic" else 1.0
            return round(value * stretched) - (int(text.pad_token_id or 0) + 1 if counts_on else 0)
    return 2**20


def base_of(adapter: Path) -> Path:
    """The folder of the adapter's base: where the adapter says, or the folder of that name beside it."""
    adapter = adapter.resolve()
    named = Path(json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    for candidate in (adapter / named, adapter.parent / named.name):
        if candidate.is_dir():
            return candidate.resolve()
    raise FledgeError(
        Problem(
            t("the base model of this adapter is not there"),
            where=str(adapter / ADAPTER_CONFIG),
            found=str(named),
            fix=t("put the base's folder beside the adapter's, or merge the adapter where both are"),
        )
    )


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's or tokenizer's folder, with its chat template."""
    folder = Path(path).resolve()
    if not (folder / "tokenizer.json").is_file():
        if is_adapter(folder):
            return load_tokenizer(base_of(folder))
        raise FledgeError(
            Problem(
                t("there is no tokenizer in this folder"),
                where=str(folder),
                allowed="tokenizer.json",
                fix=t("name a folder that was saved with its tokenizer"),
            )
        )
    return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def _load_full(
    folder: Path,
    dtype: str | torch.dtype,
    device: str,
    head: Head | None,
    labels: int | None,
    dropout: Mapping[str, float] | None,
) -> PreTrainedModel:
    require_safetensors(folder, "config.json")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    found_head = head or head_in(config)
    options: dict[str, Any] = {
        "dtype": dtype_of(dtype),
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
        **keys_of_config(config, dropout or {}),
    }
    new = found_head in ("sequence", "tokens", "body")
    if new:
        options |= {"pad_token_id": _pad_id(folder, config)}
    if labels:  # a head for another number of them is made anew
        options |= {"num_labels": labels, "ignore_mismatched_sizes": True}
    level = transformers_logging.get_verbosity()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a new head is the same every time
        transformers_logging.set_verbosity_error()  # what is missing is told below
        try:
            model, found = HEADS[found_head].from_pretrained(folder, **options, output_loading_info=True)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise FledgeError(
                Problem(
                    t("there is no such head for this family"),
                    where=str(folder),
                    found=f"{config.model_type}: {found_head}",
                )
            ) from None
        finally:
            transformers_logging.set_verbosity(level)
    inside = "" if found_head == "body" else f"{model.base_model_prefix}."
    missing = sorted(
        name
        for name in found["missing_keys"]
        if not new or (name.startswith(inside) and "pooler" not in name.split("."))  # the head alone may be new
    )
    if missing:
        raise FledgeError(Problem(t("weights are missing"), where=str(folder), found=listing(missing)))
    return cast(PreTrainedModel, model.to(device))


def _load_adapter(
    folder: Path,
    dtype: str | torch.dtype,
    device: str,
    trainable: bool,
    head: Head | None,
    labels: int | None,
    dropout: Mapping[str, float] | None,
) -> PreTrainedModel:
    from peft import PeftModel

    require_safetensors(folder, ADAPTER_CONFIG)
    base = load_model(base_of(folder), dtype, device, head=head, labels=labels, dropout=dropout)
    return cast(PreTrainedModel, PeftModel.from_pretrained(base, folder, is_trainable=trainable))


def _pad_id(folder: Path, config: Any) -> int | None:
    """The id that marks padding; transformers' classifiers score the last token that is not it."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
        if tokenizer.pad_token_id is not None:
            return cast(int, tokenizer.pad_token_id)
    return cast("int | None", config.pad_token_id)


def require_safetensors(folder: Path, config: str) -> None:
    """Refuse a folder without `config` or without safetensors, before any library may reach for a pickle."""
    if not (folder / config).is_file():
        raise FledgeError(Problem(t("this is not a model folder"), where=str(folder), allowed=config))
    if not any(folder.glob("*.safetensors")):
        found = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".gguf"})
        raise FledgeError(
            Problem(
                t("the weights are not in safetensors, the only format that is safe to load"),
                where=str(folder),
                found=listing(found),
                allowed="*.safetensors",
                fix=t("convert them where you trust them, or use the stage model.import for a GGUF file"),
            )
        )
