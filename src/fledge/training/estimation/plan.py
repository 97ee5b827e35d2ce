"""A training run in numbers, as far as memory and time follow from it, and the layouts over which it is divided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.core.stage import LAYOUTS, Layout
from fledge.training.estimation.network import Network

Precision = Literal["fp32", "autocast", "mixed", "bf16"]
PRECISIONS = {
    "fp32": "weights, gradients and arithmetic in fp32: 4 + 4 bytes a parameter",
    "autocast": "weights and gradients in fp32, arithmetic in 16 bits (fledge's Trainer): 4 + 4 + 2 of copies",
    "mixed": "16-bit weights and gradients, an fp32 master copy (Megatron-LM, DeepSpeed): 2 + 2 + 4",
    "bf16": "all in bf16, the optimizer's state too: 2 + 2 bytes a parameter",
}
WEIGHT = {"fp32": 4, "autocast": 4, "mixed": 2, "bf16": 2}
GRADIENT = {"fp32": 4, "autocast": 4, "mixed": 2, "bf16": 2}
COMPUTE = {"fp32": 4, "autocast": 2, "mixed": 2, "bf16": 2}

UNMASKED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gpt2", "glm", "glm4", "granite", "smollm3", "olmo2"})
"""`model_type`s whose packed documents need no mask: `training.kernels`, a test holds them equal."""
ALONE = Layout().resolve(1)


def layout_named(name: str, devices: int) -> Layout:
    """`ddp`, `zero1`, `zero2`, `zero3`, `fsdp`, `hsdp`; or `tensor`, `pipeline`, `context` over all devices."""
    if name in LAYOUTS:
        return Layout(**LAYOUTS[name]).resolve(devices)
    if name in ("tensor", "pipeline", "context"):
        return Layout.model_validate({name: devices}).resolve(devices)
    known = [*LAYOUTS, "tensor", "pipeline", "context"]
    raise FledgeError(
        Problem(t('there is no layout "{name}"', name=name), allowed=listing(known), fix=did_you_mean(name, known))
    )


def devices_of(layout: Layout) -> int:
    """How many devices a resolved layout takes."""
    return data_parallel(layout) * layout.tensor * layout.pipeline * layout.context


def data_parallel(layout: Layout) -> int:
    """Over how many devices a resolved layout divides the rows of a batch."""
    return layout.replicate * layout.shard


def sharded(layout: Layout) -> int:
    """Among how many devices a resolved layout divides a copy's state."""
    return layout.shard * layout.context


@dataclass(frozen=True)
class Plan:
    """A training run, as far as memory and time follow from it."""

    network: Network
    sequence: int
    """tokens a row"""
    micro_batch: int
    """rows at once on a device"""
    precision: Precision = "autocast"
    optimizer: str = "adamw"
    layout: Layout = ALONE
    accumulated: bool = False
    """whether a step takes several micro-batches: gradients then stay while the next activations are made"""
    lora_rank: int = 0
    """above 0 the base is frozen (in the format of the arithmetic) and adapters of that rank are trained in fp32"""
    base_bytes: float = 0.0
    """bytes a parameter of a frozen base; 0: the format of the arithmetic (QLoRA's NF4: 0.52)"""
    frozen_models: float = 0.0
    """parameters of models that are only asked (a reference, a teacher), in the format of the weights"""
    checkpointing: bool = False
    packed: bool = False
    """several documents a row"""
    written: int = 0
    """of an encoder-decoder: tokens that the decoder writes for a row; 0: as many as the encoder reads"""
    scores: float = 0.0
    """bytes that attention keeps of a head for every query and key; 0 where its kernel never holds them all"""
    compiled: bool = False
    objective: Literal["tokens", "pairs", "labels", "ranks", "texts"] = "tokens"
    """pairs: two answers a row, both forward passes are kept; labels: no output layer over the vocabulary; ranks: pairs
    without one; texts: the same, or a few at a time that are read twice"""

    @property
    def masked(self) -> bool:
        """Whether a mask that stays keeps packed documents apart; our kernel and FlashAttention only need where they
        begin, and parts of rows make it again."""
        return self.packed and self.network.family not in UNMASKED and self.layout.context == 1

    @property
    def decoded(self) -> int:
        """Tokens a row in the decoder beside an encoder."""
        return self.written or self.sequence

    @property
    def passes(self) -> int:
        """Forward passes of a row that are kept at once."""
        return 2 if self.objective in ("pairs", "ranks") or (self.objective == "texts" and not self.accumulated) else 1

    @property
    def trained(self) -> float:
        """Parameters that get gradients."""
        return self.network.lora_parameters(self.lora_rank) if self.lora_rank else self.network.parameters
