"""A trained model's context made longer: its rotary positions are stretched in its config, its weights stay.

What is made can be read at once, and better after some continued pre-training on long rows (`train.continue`): a
few hundred steps are usual (Chen et al., 2023; Peng et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.models.importing import copy_folder
from fledge.models.load import context_of, is_adapter, load_model, load_tokenizer, require_safetensors
from fledge.models.rope import RopeScaling

LONGEST = 4096
"""Tokens of a row that is measured, at most."""


def extend_folder(source: Path, folder: Path, scaling: RopeScaling) -> dict[str, Any]:
    """Copy the model in `source` to `folder` with its context `scaling.factor` times as long; what was changed.

    Raises FledgeError for a model without rotary positions, for one that is stretched already, and for an adapter.
    """
    if is_adapter(source):
        raise FledgeError(
            Problem(
                t("an adapter has no positions of its own"),
                where=str(source),
                fix=t("merge it into its base first, with the stage model.merge"),
            )
        )
    require_safetensors(source, "config.json")
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    before = dict(require_rope(config, source))
    original = scaling.original or context_of(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head * before.get("partial_rotary_factor", 1.0))
    kept = {key: before[key] for key in ("rope_theta", "partial_rotary_factor") if key in before}
    config.rope_parameters = {**kept, **scaling.parameters(original)}
    config.rope_parameters["rope_theta"] = scaling.base(float(before["rope_theta"]), rotated)
    config.max_position_embeddings = scaling.written(original)
    copy_folder(source, tuple(file.name for file in source.iterdir() if file.is_file()), folder)
    config.save_pretrained(folder)
    return {
        "context_before": original,
        "context": context_of(config),
        "rope_before": before,
        "rope": dict(config.rope_parameters),
    }


def require_rope(config: Any, where: Path | str = "") -> dict[str, Any]:
    """The config's `rope_parameters`, where they are those of one unstretched RoPE. Raises FledgeError otherwise."""
    reasons = {
        "gpt2": t("its positions are a learned table, and nothing stands behind its end"),
        "gpt_bigcode": t("its positions are a learned table, and nothing stands behind its end"),
        "bloom": t("its bias falls with the distance, at any length: read longer texts as it is"),
        "t5": t("its positions are relative, at any length: read longer texts as it is"),
        "xglm": t("its sinusoids are added to the embeddings and do not turn"),
    }
    parameters = getattr(config, "rope_parameters", None)
    reason, fix = "", ""
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        reason = reasons.get(config.model_type, t("it has no rotary positions, or several kinds of them"))
    elif parameters.get("rope_type", "default") != "default":
        reason = t("it is stretched already: {method}", method=str(parameters["rope_type"]))
        fix = t("stretch the model that it was made from, by the whole factor")
    if reason:
        raise FledgeError(
            Problem(
                t("this model's context cannot be extended"),
                where=str(where),
                found=f"{config.model_type}: {reason}",
                allowed=t("rotary positions (RoPE) that are not stretched yet"),
                fix=fix,
            )
        )
    return dict(parameters or {})


def long_rows(path: Path, texts: Iterable[str], length: int, rows: int) -> Tensor:
    """The texts as token rows (up to `rows`, `length`), one text after another, with the model's tokenizer.

    Raises FledgeError when they do not fill a single row.
    """
    tokenizer, ids = load_tokenizer(path), list[int]()
    for text in texts:
        ids += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id or 0]
        if len(ids) >= rows * length:
            break
    count = min(rows, len(ids) // length)
    if not count:
        raise FledgeError(
            Problem(
                t("the held-out text is shorter than one row"),
                where="held_out",
                found=t("{count} tokens", count=len(ids)),
                allowed=t("at least {value}", value=length),
            )
        )
    return torch.tensor(ids[: count * length]).view(count, length)


def nats_by_place(path: Path, rows: Tensor, border: int) -> dict[str, float]:
    """Mean −log p of the tokens up to place `border` of their rows, and of those behind it, in nats."""
    model: Any = load_model(path)
    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
    nats = torch.stack(found)
    return {"within": float(nats[:, : border - 1].mean()), "beyond": float(nats[:, border - 1 :].mean())}
