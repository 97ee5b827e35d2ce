"""The stages of this floor: a model from outside, and an adapter merged into its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from fledge.core.artifact import Adapter, Model
from fledge.core.job import Job
from fledge.core.reference import FirstOf, Ref
from fledge.core.stage import Estimate, Size, Stage

Dtype = Literal["float32", "bfloat16", "float16"]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Import(Stage, use="model.import", version=1):
    """A trained model from a package, a folder or the Hub, as a safetensors folder with its tokenizer."""

    sources: FirstOf = Field(description="where the model may be had; the first that is there is taken")
    file: str = Field("*", description="which GGUF file, where a source holds several (a glob)")
    dtype: Dtype = Field("float32", description="number format of weights that come dequantised from a GGUF file")

    def run(self, job: Job) -> Model:
        from fledge.models.importing import import_model
        from fledge.models.load import load_model

        import_model(job.find(self.sources), self.file, job.out, self.dtype)
        parameters = load_model(job.out, dtype="bfloat16").num_parameters()  # and so we know that it loads
        return Model(job.out, {"parameters": parameters})

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        return Estimate(seconds=(5, 120), memory=(0.6e9, 3e9), disk=0.6e9, sizes={"": Size(parameters=1.4e8)})


class Merge(Stage, use="model.merge", version=1):
    """An adapter added into its base: one model folder that needs neither. Refused where it changes the model."""

    model: Ref[Adapter] = Field(description="the adapter; it knows its base")
    dtype: Dtype = Field("float32", description="number format of the merged weights")
    bound: float = Field(
        0.0, ge=0, description="largest change of a log-probability, in nats (0: 0.01 in float32, 0.5 in 16 bits)"
    )

    def run(self, job: Job) -> Model:
        from fledge.models.merging import merge_folder

        metrics = merge_folder(job.open(self.model).path, job.out, self.dtype, self.bound)
        return Model(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        parameters = sizes[self.model.text].parameters or 1.4e8
        disk = parameters * BYTES[self.dtype]
        return Estimate(
            (3 + parameters / 5e7, 10 + parameters / 1e7),
            (0.5e9 + 8 * parameters, 0.8e9 + 16 * parameters),
            disk,
            {"": Size(parameters=parameters)},
        )
