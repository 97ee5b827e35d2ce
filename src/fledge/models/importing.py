"""Models from outside into a folder of ours: a GGUF file dequantised once to safetensors, or a Hub folder copied."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.core.reference import Outside
from fledge.models.load import dtype_of, require_safetensors
from fledge.models.save import save_model

COPIED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def import_model(found: Outside, pattern: str, folder: Path, dtype: str) -> None:
    """Write the model that lies at `found` into `folder`; of several GGUF files, the one that `pattern` names."""
    base = found.path.parent if found.path.is_file() else found.path
    ggufs = [name for name in found.files if name.endswith(".gguf") and _matches(name, pattern)]
    if len(ggufs) == 1:
        model, tokenizer = load_gguf(base / ggufs[0], dtype)
        save_model(model, tokenizer, folder)
    elif not ggufs and "config.json" in found.files:
        require_safetensors(base, "config.json")
        copy_folder(base, found.files, folder)
    else:
        raise FledgeError(
            Problem(
                t("there is no one model here"),
                where=found.text,
                found=listing(ggufs or [name for name in found.files if "/" not in name]),
                allowed=t("one GGUF file that matches {pattern}, or config.json with safetensors", pattern=pattern),
                fix=t("name one file with `file`"),
            )
        )


def load_gguf(file: Path, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a GGUF file, dequantised."""
    from transformers import GgufConfig

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=dtype_of(dtype), quantization_config=GgufConfig(dequantize=True), trust_remote_code=False
    )
    return cast(PreTrainedModel, model.eval()), cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(**where))


def copy_folder(base: Path, names: tuple[str, ...], folder: Path) -> None:
    """Copy what a transformers model folder is read from; other formats of the same weights stay behind."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if "/" not in name and any(fnmatch(name, pattern) for pattern in COPIED):
            shutil.copyfile(base / name, folder / name)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(Path(name).name, pattern)
