"""How a training keeps what its model already knows, as a recipe says it. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from fledge.core.artifact import Conversations, Documents, Records
from fledge.core.reference import Ref
from fledge.core.stage import Config


class Unfreeze(Config):
    """Progressive unfreezing (Howard and Ruder, 2018, section 3.3): the head and the topmost layers first, the
    embeddings last."""

    every: float = Field(gt=0, description="when the next layers join: a share of all steps below 1, else steps")
    layers: int = Field(1, gt=0, description="how many layers join at a time, and how many are trained at first")


class EWC(Config):
    """Elastic weight consolidation (Kirkpatrick et al., 2017): a weight is held the more firmly, the more the old
    task's likelihood turns on it."""

    data: Ref[Conversations | Documents] = Field(description="rows of the old task, to estimate its Fisher information")
    strength: float = Field(
        100.0, gt=0, description="λ: how many times the tokens of the new task the old one counts (1 to 10,000)"
    )
    rows: int = Field(200, gt=0, description="how many rows to estimate from, at most")


class Replay(Config):
    """Rows of earlier corpora among those of the new one."""

    data: list[Ref[Records]] = Field(min_length=1, description="earlier corpora; each gives equally many rows")
    share: float = Field(0.1, gt=0, lt=1, description="the share of all rows that come from them, exactly")


def _named(value: object) -> object:
    """`english.held_out` alone is called `english_held_out`; so are several in a list."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(item, str) for item in several):
        return value
    return {str(item).rstrip("/").rpartition("/")[2].replace(".", "_"): item for item in several}


class Forgetting(Config):
    """General data on which the model is measured before and after."""

    data: Annotated[dict[str, Ref[Conversations | Documents]], BeforeValidator(_named)] = Field(
        min_length=1,
        description="by name, or one after another: conversations (loss on the answers) or texts (bits per byte)",
    )
    rows: int = Field(200, gt=0, description="how many rows of each, at most")
