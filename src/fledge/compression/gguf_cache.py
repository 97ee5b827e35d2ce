"""A model folder as a GGUF file for llama.cpp, written once and kept below the store's cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import fledge
from fledge.core.artifact import digest_of, sha256_of
from fledge.core.language import t
from fledge.core.store import home

_FORMATS = {"auto": "bf16", "float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
_TOKENS = 512
"""of our own texts, on which the file is compared with the model"""


def gguf_of(folder: Path, dtype: str, tell: Callable[[str], None] = lambda message: None) -> Path:
    """The file of a model folder (an adapter is merged), made now when it is not there; `dtype` as engines name it.

    Raises FledgeError for what GGUF's llama cannot hold."""
    from fledge.compression.fidelity import texts_of
    from fledge.compression.gguf import export_folder
    from fledge.compression.source import full_folder

    form = _FORMATS[dtype]
    files = sorted(file for file in folder.iterdir() if file.is_file())
    digest = digest_of({"files": [[f.name, sha256_of(f)] for f in files], "version": fledge.__version__, "form": form})
    target = home() / "cache" / "gguf" / digest[:16]
    file = target / f"{folder.name}-{form}.gguf"
    if not file.is_file():
        tell(t("writing the model as GGUF: {path}", path=file))
        making = target.with_name(target.name + ".making")
        shutil.rmtree(making, ignore_errors=True)
        try:
            source = full_folder(folder, making / "merged")
            export_folder(source, making, folder.name, form, texts_of(None), _TOKENS, None)
            shutil.rmtree(making / "merged", ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            making.replace(target)
        finally:
            shutil.rmtree(making, ignore_errors=True)
            tell("")
    return file
