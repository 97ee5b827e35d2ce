"""One vector for a text: which of its tokens' last hidden states make it, and whether its length is made 1.

`train.embed` writes `"pooling"` into the model's `config.json` and learns from the angles between vectors: these are
unit vectors. Folders of sentence-transformers say it in `modules.json`. A folder that says nothing gives the mean of
its hidden states as it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t

How = Literal["mean", "last", "cls"]
_SENTENCE_TRANSFORMERS: dict[str, How] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
}  # fmt: skip


@dataclass(frozen=True)
class Pooling:
    """`how`: the mean over a text's tokens, the last one's state, or the first one's. `unit`: vectors of length 1."""

    how: How = "mean"
    unit: bool = False

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D) and (B, T), 1 for tokens and 0 for padding on the right → (B, D) in fp32."""
        hidden = hidden.float()
        if self.how == "cls":
            found = hidden[:, 0]
        elif self.how == "last":
            found = hidden[torch.arange(len(mask), device=mask.device), mask.sum(-1) - 1]
        else:
            weights = mask[:, :, None].float()
            found = (hidden * weights).sum(1) / weights.sum(1)
        return F.normalize(found, dim=-1) if self.unit else found


def pooling_of(folder: Path) -> Pooling:
    """What a model's or an adapter's folder says. Raises FledgeError for a pooling that is not known."""
    if modules := _json(folder / "modules.json"):
        return _of_modules(folder, modules)
    said = _json(folder / "config.json").get("pooling") if (folder / "config.json").is_file() else None
    if said is None:
        return Pooling()
    if said not in get_args(How):
        raise _unknown(folder / "config.json", str(said))
    return Pooling(cast(How, said), unit=True)


def _of_modules(folder: Path, modules: Any) -> Pooling:
    kinds = {str(module["type"]).rsplit(".", 1)[-1]: folder / str(module["path"]) for module in modules}
    config = _json(kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if config.get("pooling_mode") in get_args(How):
        how = cast(How, config["pooling_mode"])
    elif len(modes) == 1 and modes[0] in _SENTENCE_TRANSFORMERS:
        how = _SENTENCE_TRANSFORMERS[modes[0]]
    else:
        raise _unknown(folder / "modules.json", listing(modes))
    if strange := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise _unknown(folder / "modules.json", listing(strange))
    return Pooling(how, unit="Normalize" in kinds)


def _unknown(file: Path, found: str) -> FledgeError:
    return FledgeError(
        Problem(
            t("this way to make one vector of a text is not known"),
            str(file),
            found=found,
            allowed=listing(list(get_args(How))),
        )
    )


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
