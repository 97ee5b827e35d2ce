"""Models and tokenizers from folders, safely: safetensors only, never a pickle, never remote code.

`load_model` reads what fledge writes and what others do: a full model in any transformers architecture, a PEFT
adapter (with its base), a reward model (one label), an int8 folder of compressed-tensors.

An adapter names its base by an absolute path in `adapter_config.json`, because that is what PEFT and transformers
resolve without us. When a store has been moved, that path is gone; since artifacts are neighbours in a store, the
folder of the same name beside the adapter is then taken.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t

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
) -> PreTrainedModel:
    """The model in `path`, in evaluation mode, without gradients unless `trainable`.

    An adapter comes with its base under it (a `PeftModel`). `reward=True` gives a sequence-classification model with
    one label: its head is new when the folder holds a language model. Raises FledgeError for a folder that holds no
    model or no safetensors.
    """
    folder = Path(path).resolve()
    if is_adapter(folder):
        model = _load_adapter(folder, dtype, device, reward, trainable)
    else:
        model = _load_full(folder, dtype, device, reward)
        model.requires_grad_(trainable)
    return model.eval()


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


def _load_full(folder: Path, dtype: str | torch.dtype, device: str, reward: bool) -> PreTrainedModel:
    require_safetensors(folder, "config.json")
    options: dict[str, Any] = {
        "dtype": dtype_of(dtype),
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
    }
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if reward:
        options |= {"num_labels": 1, "pad_token_id": _pad_id(folder, config)}
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    level = transformers_logging.get_verbosity()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a new reward head is the same every time
        transformers_logging.set_verbosity_error()  # what is missing is told below
        try:
            model, found = auto.from_pretrained(folder, **options, output_loading_info=True)
        finally:
            transformers_logging.set_verbosity(level)
    missing = sorted(set(found["missing_keys"]) - ({"score.weight"} if reward else set()))
    if missing:
        raise FledgeError(Problem(t("weights are missing"), where=str(folder), found=listing(missing)))
    return cast(PreTrainedModel, model.to(device))


def _load_adapter(
    folder: Path, dtype: str | torch.dtype, device: str, reward: bool, trainable: bool
) -> PreTrainedModel:
    from peft import PeftModel

    require_safetensors(folder, ADAPTER_CONFIG)
    base = load_model(base_of(folder), dtype, device, reward)
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
