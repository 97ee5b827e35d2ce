"""Supervised fine-tuning on conversations: the loss is on what the assistant says, its end of turn included.

The batch's labels are −100 wherever the renderer gave weight 0 (what users say, the template's own tokens), so the
loss is that of causal language modelling on the rest: step 1 of Ouyang et al. (2022).
"""

from __future__ import annotations

from fledge.training.objectives.causal_lm import CausalLM


class Chat(CausalLM):
    """The mean over the assistants' content tokens and ends of turn, over the whole batch: long answers count more."""
