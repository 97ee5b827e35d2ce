"""Memory of a training run by part, per device.

Weights, gradients and optimizer state follow from counting; activations from what autograd keeps in transformers'
layers, read off layer by layer (a test compares them with what PyTorch really saves). Korthikanti et al. (2022) give
s·b·h·(34 + 5·a·s/h) bytes a layer for Megatron's GPT in fp16: `megatron_activations`. The attention scores in it are
gone with SDPA and FlashAttention, and a SwiGLU layer keeps other tensors than a GELU layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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

BUCKET = 2**24  # numbers of gradients in one message: training.layout.ranks
CHUNK, MOST = 2**20, 2**26  # logits held at once by training.likelihood: a test holds them equal


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
    """several documents a row: a mask keeps them apart"""
    compiled: bool = False
    objective: Literal["tokens", "pairs", "labels"] = "tokens"
    """pairs: two answers a row, both forward passes are kept; labels: no output layer over the vocabulary"""

    @property
    def trained(self) -> float:
        """Parameters that get gradients."""
        return self.network.lora_parameters(self.lora_rank) if self.lora_rank else self.network.parameters


PARTS = (
    "weights", "copies", "gradients", "optimizer", "activations", "logits", "buffers", "frozen", "allocator",
    "framework",
)  # fmt: skip
"""Of `Memory`, in the order in which they are shown."""


@dataclass(frozen=True)
class Memory:
    """Bytes a device, by part. `framework` is what the process takes before there is a model."""

    weights: float = 0.0
    copies: float = 0.0
    """16-bit copies that autocast makes of the matrices"""
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    """the output layer: a chunk of logits at a time, gradients of the hidden states and of the output layer"""
    buffers: float = 0.0
    """layers gathered by ZeRO-3, all-reduce buckets, the step's scratch space"""
    frozen: float = 0.0
    """models that are only asked"""
    allocator: float = 0.0
    """freed pieces that fit nothing that is asked for"""
    framework: float = 0.0

    @property
    def total(self) -> float:
        """Bytes at the moment when most is held."""
        return float(sum(getattr(self, part) for part in PARTS))

    def parts(self) -> Iterator[tuple[str, float]]:
        """Every part with its bytes, in order; parts that are not there are left out."""
        yield from ((part, value) for part in PARTS if (value := getattr(self, part)))


@dataclass(frozen=True)
class Surroundings:
    """What a process takes beside the numbers of its model.

    On a CPU: measured here, torch 2.13 with glibc told to keep freed memory (`training.kernels`). On a card: a CUDA
    context with cuBLAS's workspaces and the caching allocator's rounding; an assumption, not measured.
    """

    framework: float
    """bytes before there is a model"""
    slack: float
    """bytes lost to fragmentation for each byte that comes and goes"""
    shapes: float = 0.0
    """bytes that oneDNN comes to keep for matrix products of ever other shapes: documents of many lengths in a row"""

    @classmethod
    def of(cls, kind: str = "cpu") -> Surroundings:
        """For `cpu`, or a card."""
        return CPU if kind == "cpu" else CARD


CPU, CARD = Surroundings(0.46e9, 0.32, 0.8e9), Surroundings(0.9e9, 0.08)
NOTHING = Surroundings(0.0, 0.0)
COMPILER = 0.05e9  # what inductor adds to a process


def memory_of(plan: Plan, around: Surroundings = NOTHING) -> Memory:
    """Bytes per device when most is held: at the end of the forward pass, or in the optimizer's step.

    At the end of the forward pass all activations are there and (accumulation apart) no gradients yet; in the step it
    is the other way round. The larger of the two counts.
    """
    network, layout = plan.network, plan.layout
    share = _held_share(network, layout)  # of all parameters: what a pipeline stage and a tensor slice holds
    weights, copies = _weights(plan, share)
    trained = plan.trained * (1 / layout.tensor / layout.pipeline if plan.lora_rank else share)
    divided = trained / layout.shard
    width = 4 if plan.lora_rank else GRADIENT[plan.precision]
    gradients = (divided if layout.zero >= 2 or layout.shard == 1 else trained) * width
    held = {
        "weights": weights,
        "optimizer": divided * optimizer_bytes(plan),
        "frozen": plan.frozen_models * WEIGHT[plan.precision] * share / (layout.shard if layout.zero == 3 else 1),
        "buffers": _buffers(plan, share),
        "framework": around.framework + COMPILER * plan.compiled * bool(around.slack) + around.shapes * plan.packed,
    }
    forward = {
        "copies": copies, "gradients": gradients * (plan.accumulated or plan.checkpointing),
        "activations": _activations(plan), "logits": _logits(plan),
    }  # fmt: skip
    step = {"gradients": gradients}
    moving = max(forward, step, key=lambda parts: sum(parts.values()))
    return Memory(**held, **moving, allocator=around.slack * sum(moving.values()))


def optimizer_bytes(plan: Plan) -> float:
    """Bytes of optimizer state a trained parameter (a master copy of the weights included, where there is one)."""
    network = plan.network
    number = 2 if plan.precision == "bf16" and not plan.lora_rank else 4
    inner = 1.0 if plan.lora_rank else network.matrices / network.parameters
    master = 4 if plan.precision == "mixed" and not plan.lora_rank else 0
    name = plan.optimizer.lower().replace("_", "").replace("-", "")
    if name == "muon":  # one momentum for the matrices inside the layers, AdamW's two moments for the rest
        return master + number * (inner + 2 * (1 - inner))
    if name == "adafactor":  # a row and a column for each matrix
        return master + number * 2 / math.sqrt(max(1, network.hidden * network.intermediate))
    if "8bit" in name:  # two moments of a byte, a scale for each block of 256
        return master + 2 * (1 + 4 / 256)
    if name in ("sgd", "lion"):
        return master + number
    return master + 2 * number


def _held_share(network: Network, layout: Layout) -> float:
    """The share of all parameters on the fullest device: tables stand on the first and the last pipeline stage only."""
    if layout.pipeline == 1:
        return 1 / layout.tensor
    tables = network.vocabulary * network.hidden
    inner = network.parameters - network.embedding_parameters
    return (math.ceil(network.layers / layout.pipeline) / network.layers * inner + tables) / (
        network.parameters * layout.tensor
    )


def _weights(plan: Plan, share: float) -> tuple[float, float]:
    """(weights, autocast's copies of the matrices). A frozen base lies in the format of the arithmetic."""
    network, layout = plan.network, plan.layout
    divided = layout.shard if layout.zero == 3 else 1
    if plan.lora_rank:
        base = plan.base_bytes or COMPUTE[plan.precision]
        adapters = plan.trained / (layout.tensor * layout.pipeline)
        return (base * network.parameters * share + 4 * adapters) / divided, 2 * adapters
    weights = WEIGHT[plan.precision] * network.parameters * share / divided
    if plan.precision != "autocast":
        return weights, 0.0
    return weights, 2 * network.matrices * share / divided


def activations_per_token(plan: Plan) -> float:
    """Bytes that autograd keeps of one layer for one token, on one device without checkpointing.

    Read off transformers' LLaMA and GPT-2 layers: inputs of norms and of matrices, Q, K, V, what the gate multiplies.
    Under autocast each matrix has a 16-bit copy of its input; compiled layers keep each once and compute the rest
    again.
    """
    network = plan.network
    d, q, kv, f = network.hidden, network.attention_width, network.kv_width, network.intermediate
    c = COMPUTE[plan.precision]
    residual = 4 if plan.precision in ("fp32", "autocast") and not plan.lora_rank else c
    mask = c * plan.sequence * plan.packed / plan.layout.context
    keys = q + (q if network.kv_heads > 1 else kv) if plan.packed else 2 * kv  # heads are repeated under a mask
    small = 4 * network.heads + 8 + mask
    if plan.compiled:
        norms, ups = (2, 3 if network.gated else 2)
        kept = residual * d + norms * c * d + c * (3 * q + keys - (0 if network.gated else q)) + ups * c * f
    elif network.gated:
        norms = 4 if residual == 4 and not plan.lora_rank else 2  # a frozen norm keeps its input only
        inputs = 5 if plan.precision == "autocast" and not plan.lora_rank else 2
        kept = norms * 4 * d + inputs * c * d + c * (2 * q + keys) + 4 * c * f
    else:
        kept = 2 * residual * d + 2 * c * d + c * (2 * q + keys) + 5 * c * f
    if plan.lora_rank:
        kept += 7 * c * plan.lora_rank
    return kept + small


def _activations(plan: Plan) -> float:
    """Bytes of all activations of a micro-batch that are there when the backward pass begins."""
    network, layout = plan.network, plan.layout
    passes = 2 if plan.objective == "pairs" else 1
    tokens = passes * plan.micro_batch * plan.sequence / layout.context
    residual = COMPUTE[plan.precision] if plan.lora_rank or plan.precision in ("mixed", "bf16") else 4
    layers = math.ceil(network.layers / layout.pipeline)
    in_flight = min(layout.pipeline, network.layers)  # 1F1B: the first stage holds as many micro-batches as stages
    a_layer = activations_per_token(plan) / layout.tensor  # sequence parallelism divides the norms' inputs, too
    ends = 2 * residual * network.hidden / layout.tensor  # the embedding's output and the last norm's input
    if plan.checkpointing:  # each layer's input; one layer computed again, and the gradients of what it keeps
        return tokens * (layers * in_flight * residual * network.hidden / layout.tensor + 2 * a_layer + ends)
    return tokens * (layers * in_flight * a_layer + ends)


def rows_of_logits(vocabulary: int, width: int) -> int:
    """Rows of logits that `training.likelihood` holds at once."""
    return max(32, min(max(CHUNK // vocabulary, width), MOST // vocabulary))


def _logits(plan: Plan) -> float:
    """What the output layer holds while its gradients are made: never the logits of the whole batch."""
    network, layout = plan.network, plan.layout
    c, d, vocabulary = COMPUTE[plan.precision], network.hidden, network.vocabulary
    tokens = plan.micro_batch * plan.sequence / layout.context * (2 if plan.objective == "pairs" else 1)
    hidden = tokens * d * (4 + c + 4)  # the rows that have labels, their gradient, and that in the model's format
    if plan.objective == "labels":
        return hidden
    rows = min(tokens, rows_of_logits(vocabulary, d))
    chunk = rows * vocabulary * (4 + c) / layout.tensor
    trained = 0 if plan.lora_rank else 8  # the gradient of the output layer, and its product with the loss's
    copy = c if plan.precision == "autocast" and not plan.lora_rank else 0
    return hidden + chunk + vocabulary * d * (trained + copy) / layout.tensor


def _buffers(plan: Plan, share: float) -> float:
    """ZeRO-3 gathers the weights of two layers at a time; gradients travel in pieces of about that size."""
    network, layout = plan.network, plan.layout
    gathered = 0.0
    if layout.shard > 1 and layout.zero == 3:
        gathered = 2 * network.layer_parameters * COMPUTE[plan.precision] / layout.tensor
    elif data_parallel(layout) > 1:
        gathered = min(BUCKET, plan.trained * share) * GRADIENT[plan.precision]
    return gathered


def megatron_activations(sequence: int, rows: int, hidden: int, heads: int, layers: int = 1) -> float:
    """s·b·h·(34 + 5·a·s/h) bytes a layer: fp16, no recomputation, no parallelism (Korthikanti et al., 2022, eq. 1)."""
    return layers * sequence * rows * hidden * (34 + 5 * heads * sequence / hidden)


def inference_memory(
    network: Network, tokens: float, rows: int = 1, weight_bytes: float = 2, cache_bytes: float = 2
) -> Memory:
    """Weights and the KV cache of `rows` texts of `tokens` tokens. The cache is the part that grows with use."""
    cache = network.kv_cache_bytes(tokens, rows, cache_bytes)
    return Memory(weights=weight_bytes * network.parameters, buffers=cache)


def traffic_per_step(plan: Plan, micro_batches: int = 1) -> float:
    """Bytes that a device sends in one optimizer step for its data parallelism.

    A ring all-reduce of Ψ numbers sends 2Ψ(n−1)/n; ZeRO-1 and 2 the same (a reduce-scatter and an all-gather);
    ZeRO-3 3Ψ(n−1)/n, as the weights are gathered again for the backward pass, for every micro-batch (Rajbhandari et
    al., 2020).
    """
    layout = plan.layout
    n = data_parallel(layout)
    if n == 1:
        return 0.0
    share = _held_share(plan.network, layout)
    numbers = plan.trained * (share if not plan.lora_rank else 1 / layout.tensor / layout.pipeline)
    ring = (n - 1) / n
    gradient, weight = GRADIENT[plan.precision], COMPUTE[plan.precision]
    if layout.shard > 1 and layout.zero == 3:
        everything = plan.network.parameters * share
        return ring * (2 * weight * everything * micro_batches + gradient * numbers)
    if layout.shard > 1:
        return ring * numbers * (gradient + WEIGHT[plan.precision])
    return 2 * ring * numbers * gradient
