"""A model folder as one ONNX graph; written once and kept below the store's cache.

    inputs   input_ids (B, T), position_ids (B, T), mask (B, 1, T, P + T) added to the attention's scores,
             columns (C) whose logits are wanted, past.0 … past.2L-1 (B, H, P, D)
    outputs  logits (B, C, V), hidden (B, T, E), present.0 … present.2L-1 (B, H, P + T, D)

The module is transformers' own, in fp32; any decoder-only model works whose layers all take that mask and that cache.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fledge
from fledge.core.artifact import digest_of, sha256_of
from fledge.core.errors import FledgeError, Problem, need
from fledge.core.language import t
from fledge.core.store import home


@dataclass(frozen=True)
class Shape:
    """What a loop has to know of a graph."""

    layers: int
    heads: int
    head_size: int
    vocabulary: int
    context: int


class _Step(nn.Module):
    """The model with its cache as plain tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor, columns: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        cache = cache_of(past)
        output = self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, past_key_values=cache,
            use_cache=True, logits_to_keep=columns, output_hidden_states=True,
        )  # fmt: skip
        return (output.logits, output.hidden_states[-1], *tensors_of(cache))


def graph_of(folder: Path, tell: Callable[[str], None]) -> tuple[Path, Shape]:
    """The ONNX graph of a model folder, made now when it is not there, and its shape.

    Raises FledgeError for models that cannot be written so."""
    for library in ("onnx", "onnxscript"):
        need(library, "onnx")
    place, shape = kept(folder, "onnx", _export, tell)
    return place / "model.onnx", shape


def kept(
    folder: Path, kind: str, export: Callable[[Any, Shape, Path], None], tell: Callable[[str], None]
) -> tuple[Path, Shape]:
    """Where `export(model, shape, place)` has written the model of a folder in fp32, below the store's cache."""
    digest = digest_of({"files": [[f.name, sha256_of(f)] for f in _files(folder)], "version": fledge.__version__})
    target = home() / "cache" / kind / digest[:16]
    if not (target / "shape.json").is_file():
        tell(t("writing the model for {engine}: {path}", engine=kind, path=target))
        making = target.with_name(target.name + ".making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        try:
            model = _load(folder)
            shape = _shape(model)
            _written(export, model, shape, making)
            (making / "shape.json").write_text(json.dumps(asdict(shape)), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            making.replace(target)
        finally:
            shutil.rmtree(making, ignore_errors=True)
            tell("")
    return target, Shape(**json.loads((target / "shape.json").read_text(encoding="utf-8")))


def _load(folder: Path) -> Any:
    from fledge.models.load import load_model

    model = load_model(folder, dtype="float32", device="cpu").eval()
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _written(export: Callable[[Any, Shape, Path], None], model: Any, shape: Shape, place: Path) -> None:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            export(model, shape, place)
    except Exception as error:
        said = str(error).strip().splitlines()
        what = t("this architecture cannot be written for another engine")
        raise FledgeError(Problem(what, type(model).__name__, found=said[0] if said else repr(error))) from error


def cache_of(past: Sequence[Tensor]) -> Any:
    """A cache of transformers that holds these keys and values, layer by layer."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def tensors_of(cache: Any) -> list[Tensor]:
    """Keys and values of a cache, layer by layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _files(folder: Path) -> list[Path]:
    from fledge.models.load import base_of, is_adapter

    folders = [base_of(folder), folder] if is_adapter(folder) else [folder]
    names = ("config.json", "adapter_config.json")
    return sorted(f for each in folders for f in each.iterdir() if f.suffix == ".safetensors" or f.name in names)


def _export(model: Any, shape: Shape, place: Path) -> None:
    layers = 2 * shape.layers
    ids = torch.tensor([[5, 6, 7], [7, 6, 5]])
    example = (
        ids, torch.arange(2, 5).expand(2, 3), torch.zeros(2, 1, 3, 5), torch.tensor([1, 2]),
        [torch.zeros(2, shape.heads, 2, shape.head_size) for _ in range(layers)],
    )  # fmt: skip
    auto = torch.export.Dim.AUTO
    shapes = (
        {0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto, 2: auto, 3: auto}, {0: auto},
        [{0: auto, 2: auto} for _ in range(layers)],
    )  # fmt: skip
    names = ["input_ids", "position_ids", "mask", "columns", *(f"past.{n}" for n in range(layers))]
    outputs = ["logits", "hidden", *(f"present.{n}" for n in range(layers))]
    torch.onnx.export(
        _Step(model), example, str(place / "model.onnx"), input_names=names, output_names=outputs,
        dynamic_shapes=shapes, dynamo=True, verbose=False, external_data=True,
    )  # fmt: skip


def _shape(model: Any) -> Shape:
    from fledge.models.load import context_of

    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise FledgeError(Problem(t("this architecture cannot be written for another engine"), type(model).__name__))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context = context_of(config)
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        context = min(context, window)  # the mask is one for all layers: within the window they agree
    return Shape(config.num_hidden_layers, heads, size, config.vocab_size, context)
