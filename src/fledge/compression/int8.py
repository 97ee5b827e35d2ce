"""Weights in int8 as a compressed-tensors folder: q = round(w / s), s = max|w| / 127 for every row of a matrix.

Symmetric, so no calibration data is needed and nothing but rounding is lost. Scales are rounded to their stored
format before the weights are divided by them: the error is then that of one rounding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from compressed_tensors import __version__ as format_version
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from compressed_tensors.utils import match_named_modules
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from fledge.compression.fidelity import compare, parameters_of, require_faithful, weight_bytes
from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.models.load import dtype_of, load_model, load_tokenizer

FORMATS = {"int8": "pack-quantized", "w8a8": "int-quantized"}
"""What vLLM has kernels for: weights packed four to an int32, and plain int8 where activations are int8 too."""


BOUNDS = {"int8": 0.05, "w8a8": 0.2}
"""Largest mean KL divergence in nats. SmolLM2-135M: 0.006 and 0.06."""


def quantize_folder(
    source: Path,
    folder: Path,
    scheme: str,
    ignore: Sequence[str],
    rest: str,
    texts: Sequence[str],
    tokens: int,
    bound: float | None = None,
) -> dict[str, Any]:
    """Write the model in `source` to `folder` in int8; sizes, and how far the folder is from it once loaded again.

    Raises FledgeError where that is past `bound` nats of mean KL divergence, or where nothing is left to quantise.
    """
    model, tokenizer = load_model(source), load_tokenizer(source)
    tied = sorted(getattr(model, "all_tied_weights_keys", None) or ())
    plan = scheme_of(scheme)
    ignored = list(dict.fromkeys([*ignore, *(name.removesuffix(".weight") for name in tied)]))
    weights = quantized_weights(model, plan, ignored, dtype_of(rest), tied)

    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    config = deepcopy(model.config)
    config.dtype, config.quantization_config = rest, config_of(plan, ignored)
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    measured = compare(model, load_model(folder), tokenizer, texts, tokens)
    require_faithful(measured, bound or BOUNDS[scheme], t("quantization"))
    before, after, parameters = weight_bytes(source), weight_bytes(folder), parameters_of(model)
    return {
        "bytes_before": before,
        "bytes_after": after,
        "bits_per_weight": round(8 * after / parameters, 3),
        "parameters": parameters,
        "parameters_int8": sum(p.numel() for name, p in model.named_parameters() if name + "_scale" in weights),
        "rest": rest,
        **measured,
    }


def scheme_of(name: str) -> QuantizationScheme:
    """The scheme as compressed-tensors writes it down: a scale a row, and for w8a8 one a token as it comes."""
    weights = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True, dynamic=False)
    activations = QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True)
    return QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=activations if name == "w8a8" else None,
        format=FORMATS[name],
    )


def quantized_weights(
    model: PreTrainedModel,
    scheme: QuantizationScheme,
    ignore: Sequence[str],
    rest: torch.dtype,
    tied: Sequence[str] = (),
) -> dict[str, Tensor]:
    """What the safetensors file holds: every linear layer but the ignored in int8, all else in `rest`.

    `tied` are second names of weights, left out. Raises FledgeError where no layer is left to quantise.
    """
    weights = {name: tensor.to(rest) for name, tensor in model.state_dict().items() if name not in tied}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    targeted = list(match_named_modules(model, scheme.targets, ignore))
    if not targeted:
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        raise FledgeError(Problem(t("no layer is left to quantise"), "", listing(list(ignore)), listing(linear)))
    for name, module in targeted:
        weight = module.weight.detach()  # (out, in), fp32
        scale = (weight.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-8).to(rest)  # (out, 1)
        parts = compressor.compress({"weight": weight, "weight_scale": scale.float()}, scheme)
        del weights[f"{name}.weight"]
        weights |= {f"{name}.{part}": tensor.contiguous() for part, tensor in (parts | {"weight_scale": scale}).items()}
    return weights


def config_of(scheme: QuantizationScheme, ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=scheme.format,
        ignore=list(ignore),
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    return {**config.model_dump(mode="json"), "version": format_version}
