"""Memory of a training run by part, per device.

Weights, gradients and optimizer state follow from counting, what autograd keeps from `activations`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fledge.core.stage import Layout
from fledge.training.estimation.activations import activations
from fledge.training.estimation.network import Network
from fledge.training.estimation.plan import COMPUTE, GRADIENT, WEIGHT, Plan, data_parallel, sharded

BUCKET = 2**24  # numbers of gradients in one message: training.layout.ranks
CHUNK, MOST = 2**20, 2**26  # logits held at once by training.likelihood: a test holds them equal

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
    """bytes lost to fragmentation for each byte of activations and logits, which come and go in many sizes"""
    slack_packed: float
    """the same where rows hold several documents: the sizes differ from step to step, and freed pieces fit seldom"""

    @classmethod
    def of(cls, kind: str = "cpu") -> Surroundings:
        """For `cpu`, or a card."""
        return CPU if kind == "cpu" else CARD


CPU, CARD = Surroundings(0.46e9, 0.32, 0.55), Surroundings(0.9e9, 0.08, 0.08)
NOTHING = Surroundings(0.0, 0.0, 0.0)
COMPILER = 0.05e9  # what inductor adds to a process


def memory_of(plan: Plan, around: Surroundings = NOTHING) -> Memory:
    """Bytes per device when most is held: at the end of the forward pass, or in the optimizer's step.

    At the end of the forward pass all activations are there and (accumulation apart) no gradients yet; in the step it
    is the other way round. With checkpointing there is a moment between: the first layer's activations again, and the
    gradients of all others. The largest counts.
    """
    network, layout = plan.network, plan.layout
    share = _held_share(network, layout)  # of all parameters: what a pipeline stage and a tensor slice holds
    weights, copies = _weights(plan, share)
    trained = plan.trained * (1 / layout.tensor / layout.pipeline if plan.lora_rank else share)
    divided = trained / sharded(layout)
    width = 4 if plan.lora_rank else GRADIENT[plan.precision]
    gradients = (divided if layout.zero >= 2 or sharded(layout) == 1 else trained) * width
    held = {
        "weights": weights,
        "optimizer": divided * optimizer_bytes(plan),
        "frozen": plan.frozen_models * WEIGHT[plan.precision] * share / (sharded(layout) if layout.zero == 3 else 1),
        "buffers": _buffers(plan, share),
        "framework": around.framework + COMPILER * plan.compiled * bool(around.slack),
    }
    passing = {"copies": copies, "activations": activations(plan)}
    forward = {**passing, "gradients": gradients * plan.accumulated, "logits": _logits(plan)}
    backward = {**passing, "gradients": gradients} if plan.checkpointing else {}
    step = {"gradients": gradients}
    moving = max(forward, backward, step, key=lambda parts: sum(parts.values()))
    varying = moving.get("activations", 0.0) + moving.get("logits", 0.0)
    slack = around.slack_packed if plan.packed else around.slack
    return Memory(**held, **moving, allocator=slack * varying)


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
    if "8bit" in name:  # of matrices inside the layers: two moments of a byte, a scale for each block of 256
        return master + inner * 2 * (1 + 4 / 256) + (1 - inner) * 2 * number
    if name in ("sgd", "lion"):  # SGD without momentum keeps nothing
        return master + number * (name == "lion")
    return master + 2 * number


def _held_share(network: Network, layout: Layout) -> float:
    """The share of all parameters on the fullest device: tables stand on the first and the last pipeline stage only."""
    if layout.pipeline == 1:
        return 1 / layout.tensor
    tables = network.vocabulary * network.hidden
    inner = network.parameters - network.embedding_parameters
    depth = network.layers + network.decoder_layers
    return (math.ceil(depth / layout.pipeline) / depth * inner + tables) / (network.parameters * layout.tensor)


def _weights(plan: Plan, share: float) -> tuple[float, float]:
    """(weights, autocast's copies of the matrices). A frozen base lies in the format of the arithmetic."""
    network, layout = plan.network, plan.layout
    divided = sharded(layout) if layout.zero == 3 else 1
    if plan.lora_rank:
        base = plan.base_bytes or COMPUTE[plan.precision]
        adapters = plan.trained / (layout.tensor * layout.pipeline)
        return (base * network.parameters * share + 4 * adapters) / divided, 2 * adapters
    weights = WEIGHT[plan.precision] * network.parameters * share / divided
    if plan.precision != "autocast":
        return weights, 0.0
    return weights, 2 * network.matrices * share / divided


def rows_of_logits(vocabulary: int, width: int) -> int:
    """Rows of logits that `training.likelihood` holds at once."""
    return max(32, min(max(CHUNK // vocabulary, width), MOST // vocabulary))


def _logits(plan: Plan) -> float:
    """What the output layer holds while its gradients are made: never the logits of the whole batch."""
    network, layout = plan.network, plan.layout
    c, d, vocabulary = COMPUTE[plan.precision], network.hidden, network.vocabulary
    length = plan.decoded if network.decoder_layers else plan.sequence
    tokens = plan.passes * plan.micro_batch * length / layout.context
    hidden = tokens * d * (4 + c + 4)  # the rows that have labels, their gradient, and that in the model's format
    if plan.objective in ("labels", "ranks", "texts"):
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
    if sharded(layout) > 1 and layout.zero == 3:
        gathered = 2 * network.layer_parameters * COMPUTE[plan.precision] / layout.tensor
    elif data_parallel(layout) * layout.context > 1:
        gathered = min(BUCKET, plan.trained * share) * GRADIENT[plan.precision]
    return gathered


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
    n = data_parallel(layout) * layout.context
    if n == 1:
        return 0.0
    share = _held_share(plan.network, layout)
    numbers = plan.trained * (share if not plan.lora_rank else 1 / layout.tensor / layout.pipeline)
    ring = (n - 1) / n
    gradient, weight = GRADIENT[plan.precision], COMPUTE[plan.precision]
    if sharded(layout) > 1 and layout.zero == 3:
        everything = plan.network.parameters * share
        return ring * (2 * weight * everything * micro_batches + gradient * numbers)
    if sharded(layout) > 1:
        return ring * numbers * (gradient + WEIGHT[plan.precision])
    return 2 * ring * numbers * gradient
