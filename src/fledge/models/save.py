"""Models into folders: what transformers and PEFT read without us, the same bytes for the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fledge.models.load import ADAPTER_CONFIG

TEMPLATE = "chat_template.jinja"
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    template: str | None = None,
    base: Path | None = None,
) -> None:
    """Write the model, its tokenizer and its chat template into `folder`.

    A PEFT model is written as an adapter only, and then `base` (where its base lies) is recorded in it as an
    absolute path, which PEFT and transformers can load. `template` replaces the tokenizer's own chat template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        _save_adapter(model, folder, base)
    else:
        if model.can_generate():
            model.generation_config = _generation_config(model, tokenizer)
        model.save_pretrained(folder, safe_serialization=True)
    if template is not None:
        tokenizer.chat_template = template
    for key in ("is_local", "local_files_only"):  # how it was loaded is no part of what it is
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a text or a turn."""
    ids = [tokenizer.eos_token_id, *map(tokenizer.get_vocab().get, END_OF_TURN)]
    return sorted({i for i in ids if i is not None})


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """What `model.generate` elsewhere needs to know: where to begin, where to stop, what padding is."""
    config = model.generation_config or GenerationConfig()
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = stop_ids(tokenizer) or None
    config.pad_token_id = tokenizer.pad_token_id
    return config


def _save_adapter(model: Any, folder: Path, base: Path | None) -> None:
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    file = folder / ADAPTER_CONFIG
    config = {key: _ordered(value) for key, value in json.loads(file.read_text(encoding="utf-8")).items()}
    if base is not None:
        config["base_model_name_or_path"] = str(base.resolve())
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _ordered(value: Any) -> Any:
    """PEFT keeps sets (target modules); as lists in a file they must have one order."""
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
