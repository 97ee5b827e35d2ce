"""The runs of a scaling study: one stage, many sizes and lengths. Light."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fledge.core.units import show_count

if TYPE_CHECKING:
    from fledge.training.scaling.stages import Scaling


def all_runs(stage: Scaling) -> list[tuple[str, Any]]:
    """(name, pre-training) of every small run and, last, of the one that the law is checked on."""
    if stage.of is None:
        return []
    lengths = stage.tokens or [stage.of.tokens]
    wanted = [(size, tokens) for size in stage.sizes for tokens in lengths]
    if stage.check_on:
        wanted.append((stage.check_on.size, stage.check_on.tokens))
    return [(f"{show_count(size)}-{show_count(tokens)}", resized(stage.of, size, tokens)) for size, tokens in wanted]


def resized(stage: Any, size: int, tokens: int) -> Any:
    """The pre-training with another size and length; widths follow from the size, as they do in a recipe."""
    shape = {**stage.model.model_dump(exclude_unset=True), "size": size}
    for key in ("hidden", "layers", "heads", "kv_heads", "intermediate"):
        shape.pop(key, None)
    model = type(stage.model).model_validate(shape)
    return stage.model_copy(update={"model": model, "tokens": tokens})
