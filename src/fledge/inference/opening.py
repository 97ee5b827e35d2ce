"""Which engine a model folder needs: `open_engine`.

| the folder's `config.json` | engine |
|---|---|
| an encoder-decoder (T5, BART) | `EncoderDecoderEngine` |
| an encoder (BERT), a body without a head, as `train.embed` makes | `EmbeddingEngine` |
| everything else, adapters and reward models too | `NativeEngine` |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t

if TYPE_CHECKING:
    from fledge.inference.embedding import EmbeddingEngine
    from fledge.inference.encoder_decoder import EncoderDecoderEngine
    from fledge.inference.engine import Engine
    from fledge.inference.native import NativeEngine

    OwnEngine = NativeEngine | EncoderDecoderEngine | EmbeddingEngine

Kind = Literal["decoder", "encoder-decoder", "vectors"]


def kind_of(folder: Path) -> Kind:
    """What a folder holds, from its `config.json`, or its base's where it is an adapter."""
    from fledge.models.load import base_of, is_adapter

    config = _config(folder)
    if not config and is_adapter(folder):
        config = _config(base_of(folder))
    name = next(iter(config.get("architectures") or ()), "")
    if config.get("pooling") or (folder / "modules.json").is_file():
        return "vectors"
    if config.get("is_encoder_decoder") and not name.endswith(("ForSequenceClassification", "EncoderModel")):
        return "encoder-decoder"
    return "vectors" if name.endswith(("Model", "ForMaskedLM", "ForPreTraining")) and not _writes(name) else "decoder"


def _writes(name: str) -> bool:
    return name.endswith(("LMHeadModel", "DoubleHeadsModel"))


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def open_engine(
    path: Path | str,
    dtype: str = "auto",
    device: str = "auto",
    *,
    engine: str = "native",
    reward: bool = False,
    adapters: Mapping[str, Path] | None = None,
    **options: Any,
) -> OwnEngine | Engine:
    """The engine for a model folder. `options` are those of the engine's constructor, `adapters` LoRA folders by name.

    `engine`: "native" for the table above, "vllm", "llama.cpp", "openvino" or "onnx" for another one, a URL for one
    that runs already; `path` may be a URL itself. Raises FledgeError for a folder that holds no model, and for
    adapters where the engine takes none.
    """
    if engine != "native" or str(path).startswith(("http://", "https://")):
        from fledge.inference.engines.opening import open_other

        return open_other(path, engine, dtype, device, **(options | ({"adapters": adapters} if adapters else {})))
    folder = Path(path)
    kind: Kind = "decoder" if reward else kind_of(folder)
    if kind == "decoder":
        from fledge.inference.native import NativeEngine

        if adapters:
            options["adapters"] = adapters
        return NativeEngine.from_folder(folder, dtype, device, reward=reward, **options)
    if adapters:
        raise FledgeError(
            Problem(t("adapters by request need a decoder-only model that writes"), str(folder), found=kind)
        )
    if kind == "encoder-decoder":
        from fledge.inference.encoder_decoder import EncoderDecoderEngine

        return EncoderDecoderEngine.from_folder(folder, dtype, device, **options)
    from fledge.inference.embedding import EmbeddingEngine

    return EmbeddingEngine.from_folder(folder, dtype, device, **options)
