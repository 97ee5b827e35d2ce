"""What a model can be asked: tokens that it has, no more of them than its context holds."""

from __future__ import annotations

from collections.abc import Sequence

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engine import PromptTooLong, Request


def check_prompt(request: Request, prompt: Sequence[int], most: int, vocabulary: int) -> None:
    """Raise FledgeError where `prompt` (the request's token ids) is empty, longer than `most` tokens, or holds ids that
    are none of `vocabulary` many; or where the request's bias is for such ids."""
    if not prompt:
        raise FledgeError(Problem(t("the prompt is empty"), "prompt"))
    check_ids(prompt, most, vocabulary)
    if request.logit_bias:
        _check_range(list(request.logit_bias), vocabulary, "logit_bias")


def check_ids(ids: Sequence[int], most: int, vocabulary: int) -> None:
    """The same for bare token ids, of which there is at least one."""
    if len(ids) > most:
        found, allowed = t("{n} tokens", n=len(ids)), t("at most {n} tokens", n=most)
        what = t("the prompt is longer than the model's context")
        raise PromptTooLong(Problem(what, "prompt", found=found, allowed=allowed))
    _check_range(ids, vocabulary, "prompt")


def _check_range(ids: Sequence[int], vocabulary: int, where: str) -> None:
    worst = max(ids) if min(ids) >= 0 else min(ids)
    if not 0 <= worst < vocabulary:
        raise FledgeError(
            Problem(t("a token id is outside the vocabulary"), where, str(worst), f"0 … {vocabulary - 1}")
        )
