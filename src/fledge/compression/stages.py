"""The stages of this floor: an int8 folder for transformers and vLLM, a GGUF file for llama.cpp and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from fledge.core.artifact import GGUF, Model, Records
from fledge.core.job import Job
from fledge.core.reference import Ref
from fledge.core.stage import Estimate, Size, Stage
from fledge.core.units import Count

BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5}
"""Bits a weight: a block of 32 shares one or two 16-bit numbers."""


class Quantize(Stage, use="quantize", version=1):
    """Linear layers in int8, each row with its own scale; the rest in 16 bits. Refused where the model changes.

    The folder is in the compressed-tensors format, which transformers and vLLM read without us. The embedding (and
    the output layer, tied to it or not) stays in `rest`: transformers loads no quantised embedding.
    """

    model: Ref[Model] = Field(description="the model; an adapter is merged into its base first")
    scheme: Literal["int8", "w8a8"] = Field(
        "int8", description="int8: weights alone; w8a8: activations too, a scale a token, taken as they come"
    )
    ignore: list[str] = Field(["lm_head"], description="linear layers that stay as they are (names or re:PATTERN)")
    rest: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="number format of the scales, the embedding and the norms"
    )
    data: Ref[Records] | None = Field(None, description="records on whose texts to compare (default: a few of ours)")
    tokens: Count = Field(4_096, gt=0, description="compare on about so many tokens")
    max_kl: float | None = Field(
        None, gt=0, description="largest mean KL divergence a token, in nats (default: 0.05 for int8, 0.2 for w8a8)"
    )

    def run(self, job: Job) -> Model:
        from fledge.compression.fidelity import texts_of
        from fledge.compression.int8 import quantize_folder
        from fledge.compression.source import full_folder

        source = full_folder(job.open(self.model).path, job.work / "merged")
        texts = texts_of(job.open(self.data) if self.data else None)
        metrics = quantize_folder(source, job.out, self.scheme, self.ignore, self.rest, texts, self.tokens, self.max_kl)
        return Model(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        parameters = sizes[self.model.text].parameters or 1.4e8
        work = 2 * 2 * parameters * self.tokens / machine.rate("score.flops", 60e9)
        seconds = 4 + parameters / 5e7 + work
        return Estimate(
            (seconds / 2, 3 * seconds), (0.5e9 + 8 * parameters, 0.8e9 + 14 * parameters), 1.4 * parameters,
            {"": Size(parameters=parameters, bytes=1.4 * parameters)},
        )  # fmt: skip


class Export(Stage, use="export", version=1):
    """One GGUF file of a LLaMA-shaped model: weights, tokenizer, chat template. Refused where the model changes."""

    model: Ref[Model] = Field(description="the model; an adapter is merged into its base first")
    format: Literal["gguf"] = Field("gguf", description="the kind of file")
    quantization: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = Field(
        "q8_0", description="number format of the matrices; norms stay in f32, below 8 bits the embedding stays in q8_0"
    )
    name: str = Field("model", pattern=r"^[A-Za-z0-9][\w.-]*$", description="the file is NAME-FORMAT.gguf")
    data: Ref[Records] | None = Field(None, description="records on whose texts to compare (default: a few of ours)")
    tokens: Count = Field(2_048, gt=0, description="compare on about so many tokens")
    max_kl: float | None = Field(
        None,
        gt=0,
        description="largest mean KL divergence, nats a token (default: 1e-4 in f32, 0.05 in 8 or 16 bits, 0.5 below)",
    )

    def run(self, job: Job) -> GGUF:
        from fledge.compression.fidelity import texts_of
        from fledge.compression.gguf import export_folder
        from fledge.compression.source import full_folder

        source = full_folder(job.open(self.model).path, job.work / "merged")
        texts = texts_of(job.open(self.data) if self.data else None)
        metrics = export_folder(source, job.out, self.name, self.quantization, texts, self.tokens, self.max_kl)
        return GGUF(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        parameters = sizes[self.model.text].parameters or 1.4e8
        size = parameters * BITS[self.quantization] / 8
        seconds = 5 + parameters / 1e7 + 2 * 2 * parameters * self.tokens / machine.rate("score.flops", 60e9)
        return Estimate(
            (seconds / 2, 3 * seconds), (0.5e9 + 8 * parameters, 0.8e9 + 16 * parameters), size,
            {"": Size(parameters=parameters, bytes=size)},
        )  # fmt: skip
