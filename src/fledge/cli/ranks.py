"""`fledge plan --ranks 1024 --layout '{shard: 8, tensor: 8, pipeline: 4}'`: what each of many processes would hold."""

from __future__ import annotations

from rich.table import Table

from fledge.cli.console import terminal
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.recipe import Node, Recipe
from fledge.core.units import show_bytes, show_count
from fledge.models.shape import ModelShape

VOCABULARY = 32_768  # where the recipe trains no tokenizer


def print_ranks(recipe: Recipe, processes: int) -> None:
    """A table for every model that the recipe trains from scratch: the fullest and the emptiest process of each stage
    of its pipeline. Raises FledgeError where there is none, or where the layout does not fit."""
    from fledge.training.layout.dry_run import Holding, per_rank

    console, found = terminal(), False
    for node in recipe.nodes:
        model = getattr(node.stage, "model", None)
        if not isinstance(model, ModelShape):
            continue
        found, shape = True, model.resolve(_vocabulary(recipe, node), getattr(node.stage, "seq_len", 2048))
        title = f"{node.name}: {show_count(shape.parameters)}"
        table = Table(title=title, box=None, pad_edge=False, title_justify="left")
        for name in (t("rank"), t("place"), t("parameters"), t("weights"), t("gradients"), t("optimizer"),
                     t("put together"), t("in all")):  # fmt: skip
            table.add_column(name, justify="left" if name == t("place") else "right")

        def add(held: Holding, table: Table = table) -> None:
            place = "  ".join(f"{name} {number}" for name, number in held.places.items())
            sizes = (held.weights, held.gradients, held.optimizer, held.whole, held.bytes)
            table.add_row(str(held.rank), place, show_count(held.parameters), *map(show_bytes, sizes))

        for held in per_rank(node.execution.layout, shape, processes):
            add(held)
        console.print(table)
    if not found:
        raise FledgeError(Problem(t("the recipe trains no model from scratch"), where="--ranks"))


def _vocabulary(recipe: Recipe, node: Node) -> int:
    parent = node.parents.get("tokenizer")
    stage = recipe.node(parent[0]).stage if parent else None
    return int(getattr(stage, "vocab_size", VOCABULARY))
