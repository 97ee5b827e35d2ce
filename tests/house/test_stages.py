"""A stage's class is its reference page: nothing in it may be left unsaid."""

from __future__ import annotations

import typing
from collections.abc import Iterator

from pydantic import BaseModel

from fledge.cli.main import STAGES
from fledge.core.stage import Stage, all_stages


def fledge_stages() -> dict[str, type[Stage]]:
    """The stages of the house; other tests of the same process may have brought toys."""
    return {use: stage for use, stage in all_stages().items() if stage.__module__.startswith("fledge.")}


def schemas(root: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """`root` and every schema that its fields mention, at any depth, each once."""
    seen: set[type[BaseModel]] = set()
    pending: list[object] = [root]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if kind not in seen:
                seen.add(kind)
                pending.extend(field.annotation for field in kind.model_fields.values())
                yield kind
        else:
            pending.extend(typing.get_args(kind))


def test_every_stage_and_every_field_says_what_it_is() -> None:
    silent = []
    for use, stage in fledge_stages().items():
        assert stage.version >= 1, f"{use} has no version"
        assert stage.run is not Stage.run, f"{use} does nothing"
        for schema in schemas(stage):
            if not (schema.__dict__.get("__doc__") or "").strip():
                silent.append(f"{use}: {schema.__name__}")
            fields = [name for name, field in schema.model_fields.items() if not (field.description or "").strip()]
            silent += [f"{use}: {schema.__name__}.{name}" for name in fields]
    assert not silent, "no docstring or description: " + ", ".join(silent)


def test_every_step_of_a_models_life_is_there() -> None:
    life = {
        "data.collect", "data.refine", "data.split", "tokenizer.train", "train.pretrain", "train.sft", "train.reward",
        "train.dpo", "evaluate", "quantize", "export", "model.import", "model.merge",
    }  # fmt: skip
    assert life <= set(fledge_stages())


def test_every_stage_is_a_command() -> None:
    assert {command.replace(" ", ".") for command in STAGES} == set(fledge_stages())
