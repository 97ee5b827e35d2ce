"""An adapter merged into its base, and the proof that the model still says the same.

Merging loses quality where weights are tied (an adapter on the output layer would change the embedding too), where
the base is quantised, and where a low-precision format rounds. So the *saved* folder is loaded again and compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.models.load import dtype_of, load_model, load_tokenizer
from fledge.models.save import save_model


def merge_folder(adapter: Path, folder: Path, dtype: str = "float32", bound: float = 0.0) -> dict[str, float]:
    """Merge the adapter in `adapter` into its base in fp32, write the model to `folder` in `dtype`; its metrics.

    Raises FledgeError when a likely token's log-probability moved by more than `bound` nats (0: 0.01 when saved in
    float32, 0.5 in 16 bits) between the adapted model in fp32 and the saved folder, loaded again.
    """
    adapted = load_model(adapter)
    ids = probe(adapted.config.get_text_config().vocab_size)
    before = log_probabilities(adapted, ids)
    merged = cast(PreTrainedModel, cast(Any, adapted).merge_and_unload())
    save_model(merged.to(dtype_of(dtype)), load_tokenizer(adapter), folder)
    del merged, adapted
    saved = load_model(folder)
    limit = bound or (0.01 if dtype == "float32" else 0.5)
    metrics = require_alike(before, log_probabilities(saved, ids), limit, t("merging the adapter"))
    return {**metrics, "parameters": saved.num_parameters()}


def probe(vocab_size: int, rows: int = 2, length: int = 48) -> torch.Tensor:
    """Fixed token ids, spread over the whole vocabulary, on which two models are compared: (rows, length)."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(20_01))


def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """log p(next token) of `model` for `ids` (B, T), in fp32: (B, T, V)."""
    model.eval()
    with torch.no_grad():
        logits: Any = model(input_ids=ids.to(model.device), use_cache=False).logits
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def require_alike(before: torch.Tensor, after: torch.Tensor, bound: float, what: str) -> dict[str, float]:
    """How far two models' log-probabilities are apart, in nats; refuses when a probable token moved past `bound`.

    Only tokens that either model gives at least 1 in 10,000 count: what lies below is noise of the tail.
    """
    difference = (before - after).abs()
    likely = (before.exp() > 1e-4) | (after.exp() > 1e-4)
    largest, mean = float(difference[likely].max()), float(difference[likely].mean())
    if not largest <= bound:  # NaN refuses too
        raise FledgeError(
            Problem(
                t("{what} changes what the model says", what=what),
                found=t("a log-probability moves by {value} nats", value=f"{largest:.3g}"),
                allowed=t("at most {value}", value=f"{bound:.3g}"),
                fix=t("keep the adapter apart from the model, or choose a finer number format"),
            )
        )
    return {"max_logprob_difference": largest, "mean_logprob_difference": mean}
