"""Rules of thumb in circulation, what each gives for a run, and what it leaves out; our own number beside each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fledge.core.language import t
from fledge.training.estimation.activations import megatron_activations
from fledge.training.estimation.flops import flops_per_token
from fledge.training.estimation.memory import memory_of
from fledge.training.estimation.plan import ALONE, Plan


@dataclass(frozen=True)
class Rule:
    """One rule: what it says, its number, ours, and why they differ."""

    name: str
    theirs: float
    ours: float
    leaves_out: str
    unit: str
    """parameters, bytes or operations"""


def rules_of(plan: Plan, tokens: float) -> list[Rule]:
    """Every rule for a run, with our number beside it (memory: undivided, on one device)."""
    network = plan.network
    d, layers, vocabulary = network.hidden, network.layers, network.vocabulary
    memory = memory_of(replace(plan, layout=ALONE))
    states = memory.weights + memory.gradients + memory.optimizer
    size = network.parameters
    flops = tokens * flops_per_token(network, plan.sequence, recompute=plan.checkpointing)
    activations = megatron_activations(plan.sequence, plan.micro_batch, d, network.heads, layers)
    return [
        Rule("P = L(4d² + d·V)", layers * (4 * d * d + d * vocabulary), size,
             t("counts the vocabulary in every layer and leaves out the feed-forward layers"), "parameters"),
        Rule("P = 12·L·d²", 12 * layers * d * d, size,
             t("leaves out embeddings, norms and biases; fits a feed-forward layer of 4d only"), "parameters"),
        Rule(t("4 bytes a parameter"), 4 * size, states, t("the weights alone, in fp32"), "bytes"),
        Rule(t("12 bytes a parameter"), 12 * size, states,
             t("the optimizer's state of mixed precision without weights and gradients"), "bytes"),
        Rule(t("16 bytes a parameter"), 16 * size, states,
             t("right for mixed precision with Adam (18 with fp32 gradients); leaves out activations"), "bytes"),
        Rule("s·b·h·L(34 + 5·a·s/h)", activations, memory.activations,
             t("Megatron's GPT in fp16 with its attention scores, which FlashAttention does not keep"), "bytes"),
        Rule("6·N·D", 6 * size * tokens, flops,
             t("counts embeddings, which are looked up; leaves out attention and recomputation"), "operations"),
    ]  # fmt: skip
