"""How much of a model is left in a smaller copy of it: KL divergence, loss and first choices on the same texts.

KL(p‖q) = Σ p · (log p − log q), in nats, at every position, p the model's and q the copy's distribution of the next
token; its mean over positions is what the copy's loss grows by on text that the model itself would write.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fledge.core.artifact import Artifact
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.models.merging import log_probabilities
from fledge.records.kinds import texts
from fledge.records.shards import kind_in, read

TEXTS = (
    "The river had been rising since Monday, and by the end of the week the lower fields were under water. Nobody in "
    "the village was surprised: it had happened in the spring of every third year for as long as anyone could say.",
    "To make a pot of tea for four people, warm the pot, put in three spoons of leaves, and pour on water that has "
    "just come to the boil. Wait four minutes. It should cost less than 2.50, milk included.",
    "Thanks for your message! I can meet you on Thursday at 10:30, or on Friday after lunch. Which one suits you?",
    "河水从星期一开始上涨，到了周末，低处的田地已经被淹没了。村里没有人感到意外：每隔三年的春天都会这样。",
    "第一条 为了保护公民的合法权益，规范合同的订立和履行，制定本规定。当事人应当按照约定全面履行自己的义务。",
    "谢谢你的来信！我星期四上午十点半有空，星期五午饭以后也可以。你觉得哪个时间合适？",
)
"""What is compared on where a recipe names no records: both languages, prose, instructions, talk, numbers, law."""


def texts_of(data: Artifact | Path | None, limit: int = 2_000) -> Sequence[str]:
    """The first texts of some records, or ours where there are none."""
    if data is None:
        return TEXTS
    return list(islice((text for record in read(data, kind_in(data)) for text in texts(record) if text.strip()), limit))


def rows_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int, context: int) -> list[Tensor]:
    """Rows of token ids (1, T), T from 2 to at most 256 and the context, until `tokens` are reached.

    Raises FledgeError where no text has two tokens.
    """
    rows: list[Tensor] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: min(256, context)]
        if len(ids) > 1:
            rows.append(torch.tensor([ids]))
            tokens -= len(ids)
        if tokens <= 0:
            break
    if not rows:
        raise FledgeError(Problem(t("there is no text on which to compare the models")))
    return rows


def compare(
    model: PreTrainedModel, copy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int
) -> dict[str, float]:
    """Mean and largest KL divergence, the loss of both (nats a token), how often both have the same first choice."""
    rows = rows_of(tokenizer, texts, tokens, getattr(model.config.get_text_config(), "max_position_embeddings", 256))
    divergences, same = [], []
    losses = torch.zeros(2, dtype=torch.float64)
    for row in rows:
        p, q = log_probabilities(model, row), log_probabilities(copy, row)  # (1, T, V)
        divergences.append((p.exp() * (p - q)).sum(-1).flatten())
        same.append((p.argmax(-1) == q.argmax(-1)).flatten())
        losses -= torch.stack([said[0, :-1].gather(-1, row[0, 1:, None]).double().sum() for said in (p, q)])
    kl = torch.cat(divergences)
    before, after = (losses / (len(kl) - len(rows))).tolist()
    return {
        "kl_nats_mean": round(max(0.0, float(kl.double().mean())), 7),
        "kl_nats_max": round(float(kl.max()), 6),
        "same_first_choice": round(float(torch.cat(same).double().mean()), 5),
        "loss_before": round(before, 6),
        "loss_after": round(after, 6),
        "compared_tokens": len(kl),
    }


def require_faithful(measured: dict[str, float], bound: float, what: str) -> None:
    """Refuse a copy whose mean KL divergence is past `bound` (or is no number)."""
    if not measured["kl_nats_mean"] <= bound:
        raise FledgeError(
            Problem(
                t("{what} loses too much of the model", what=what),
                found=t("{value} nats of KL divergence a token", value=f"{measured['kl_nats_mean']:.3g}"),
                allowed=t("at most {value} nats", value=f"{bound:.3g}"),
                fix=t("choose a finer number format, or raise max_kl if you can live with it"),
            )
        )


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights in a model's folder."""
    return sum(file.stat().st_size for file in sorted(folder.glob("*.safetensors")))


def parameters_of(model: Any) -> int:
    """Weights of a model, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
