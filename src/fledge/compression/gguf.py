"""A LLaMA-shaped model in one GGUF file, as llama.cpp and transformers (`gguf_file=`) read it.

The names of the tensors and keys are the `gguf` package's. Matrices are quantised by it in blocks of 32 along a row;
where a row is no multiple of 32 the matrix stays in 16 bits. Norms stay in f32. A tied output layer is not written.
llama.cpp rotates neighbouring pairs of a head's channels where transformers rotates its two halves, so the rows of
W_Q and W_K are interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TensorNameMap
from numpy.typing import NDArray
from transformers import PreTrainedModel

from fledge.compression.fidelity import compare, parameters_of, require_faithful, weight_bytes
from fledge.compression.gguf_tokenizer import Vocabulary, read_vocabulary
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.models.importing import load_gguf
from fledge.models.load import load_model, load_tokenizer

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0, "q5_1": LlamaFileType.MOSTLY_Q5_1, "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1, "q4_0": LlamaFileType.MOSTLY_Q4_0,
}  # fmt: skip
BOUNDS = {"f32": 1e-4, "f16": 0.05, "bf16": 0.05, "q8_0": 0.05}
BLOCK = 32


def export_folder(
    source: Path, folder: Path, name: str, quantization: str, texts: Sequence[str], tokens: int, bound: float | None
) -> dict[str, Any]:
    """Write the model in `source` to `folder`/NAME-FORMAT.gguf; sizes, and how far the file is from it once loaded.

    Raises FledgeError for what GGUF's llama cannot hold, and where the file says other things than the model.
    """
    model, tokenizer = load_model(source), load_tokenizer(source)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{quantization}.gguf"
    write_gguf(file, model, read_vocabulary(source, tokenizer, model.config.vocab_size), name, quantization)

    copy, its_tokenizer = load_gguf(file)
    measured = compare(model, copy, tokenizer, texts, tokens)
    require_faithful(measured, bound or BOUNDS.get(quantization, 0.5), t("the export to {format}", format=quantization))
    before, after, parameters = weight_bytes(source), file.stat().st_size, parameters_of(model)
    return {
        "bytes_before": before,
        "bytes_after": after,
        "bits_per_weight": round(8 * after / parameters, 3),
        "parameters": parameters,
        "quantization": quantization,
        "same_token_ids": all(tokenizer(x)["input_ids"] == its_tokenizer(x)["input_ids"] for x in texts[:200]),
        **measured,
    }


def write_gguf(file: Path, model: PreTrainedModel, vocabulary: Vocabulary, name: str, quantization: str) -> None:
    """Write one file; the same model gives the same bytes. Raises FledgeError for what GGUF's llama cannot hold."""
    config = model.config
    require_llama(config)
    writer = GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary.write(writer)
    _add_tensors(writer, model, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def require_llama(config: Any) -> None:
    """Refuse what the architecture "llama" of GGUF has no words for."""
    values = {**config.to_dict(), **(getattr(config, "rope_parameters", None) or {})}
    wanted = {
        "model_type": "llama", "rope_type": "default", "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
    }  # fmt: skip
    for key, value in wanted.items():
        if values.get(key) != value:
            found = f"{key}: {values.get(key)}"
            raise FledgeError(
                Problem(t("this architecture cannot be written as GGUF"), found=found, allowed=f"{key}: {value}")
            )


def _add_tensors(writer: GGUFWriter, model: PreTrainedModel, quantization: str) -> None:
    names = TensorNameMap(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    for key, tensor in model.state_dict().items():
        if key in tied:
            continue
        name = names.get_name(key, try_suffixes=(".weight",))
        if name is None:
            raise FledgeError(Problem(t("this architecture cannot be written as GGUF"), found=key))
        values: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part in heads:
            values = interleave(values, heads[part])
        kind = type_of(part, values.shape, quantization)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def interleave(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """(heads · d, in) with each head's channels (0 … d/2 − 1, d/2 … d − 1) reordered as (0, d/2, 1, d/2 + 1, …)."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def type_of(part: str, shape: tuple[int, ...], quantization: str) -> GGMLQuantizationType:
    """The number format of a tensor: f32 for vectors, 16 bits where blocks of 32 do not fit, at least q8_0 for the
    embedding and the output layer, whose errors every token pays for."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = GGMLQuantizationType[quantization.upper()]
    if quantization in ("f32", "f16", "bf16"):
        return wanted
    if shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType.Q8_0 if part in ("token_embd", "output") else wanted


def describe(file: Path) -> dict[str, str]:
    """Tensor name → number format, of a GGUF file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
