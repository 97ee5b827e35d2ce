"""The stages of this floor: a model from outside, an adapter merged into its base, a context made longer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from fledge.core.artifact import Adapter, Model, Records
from fledge.core.job import Job
from fledge.core.reference import FirstOf, Ref
from fledge.core.stage import Estimate, Size, Stage
from fledge.models.rope import RopeScaling

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


class ExtendContext(Stage, use="model.extend", version=1):
    """A model that reads longer texts: its rotary positions stretched. Continued pre-training (train.continue) on long
    rows then makes it good at them."""

    model: Ref[Model] = Field(description="a model with rotary positions")
    scaling: RopeScaling = Field(
        default_factory=RopeScaling, description="how its positions are stretched, and how far"
    )
    held_out: Ref[Records] | None = Field(
        None, description="long texts on which the loss is measured before and after, within the old context and beyond"
    )
    rows: int = Field(16, gt=0, description="how many rows of the new length are measured, at most")

    def run(self, job: Job) -> Model:
        from fledge.models.extension import LONGEST, extend_folder, long_rows, nats_by_place
        from fledge.records import shards
        from fledge.records.kinds import Document

        source = job.open(self.model).path
        metrics = extend_folder(source, job.out, self.scaling)
        if self.held_out is not None:
            texts = (r.text for r in shards.read(job.open(self.held_out), "documents") if isinstance(r, Document))
            length = min(metrics["context"], max(LONGEST, 2 * metrics["context_before"]))
            rows = long_rows(source, texts, length, self.rows)
            for name, path in (("_before", source), ("", job.out)):
                found = nats_by_place(path, rows, metrics["context_before"])
                metrics |= {f"nats_{place}{name}": value for place, value in found.items()}
        return Model(job.out, metrics)

    def estimate(self, sizes: Mapping[str, Size], machine: Any) -> Estimate:
        parameters = sizes[self.model.text].parameters or 1.4e8
        read = 2 * self.rows * 4096 * 2 * parameters / 80e9 if self.held_out else 0
        return Estimate(
            (2 + 0.5 * read, 10 + 3 * read),
            (0.5e9 + (4 * parameters if self.held_out else 0), 0.8e9 + (8 * parameters if self.held_out else 0)),
            4 * parameters,
            {"": Size(parameters=parameters)},
        )
