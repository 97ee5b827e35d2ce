"""What the training stages need, as `fledge plan` shows it: memory by part, operations, whether it fits. Light."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fledge.core.machine import Device, card, devices
from fledge.core.stage import Estimate, Execution, Size
from fledge.models.architecture import Architecture
from fledge.training.estimation.activations import LAYERS
from fledge.training.estimation.duration import UTILISATION
from fledge.training.estimation.fit import ROWS, too_large
from fledge.training.estimation.memory import Surroundings, memory_of
from fledge.training.estimation.network import Network
from fledge.training.estimation.plan import Plan, data_parallel
from fledge.training.objectives.config import SpanCorruption
from fledge.training.settings import TrainSettings, flops_per_token

LOW, HIGH = 0.87, 1.15  # of the estimate: what the range says
WORTH = 3e13  # operations from which `training.compiling` compiles on its own: a test holds them equal
FLOPS = 80e9  # a second and core, until this machine has been measured
LARGE, AT_ONCE = 50_000_000, 1024  # parameters from which `training.tuning` takes few rows at once; so many tokens

TOKENS_A_CONVERSATION = 150  # where nothing is known
CONTINUED = 2048  # tokens at once of a large model in `train.continue`


def network_of(size: Size) -> Network:
    """The shape of a model that a stage is given: its `config.json`, or a LLaMA shape of about its size."""
    if size.config:
        return Network.of_config(size.config, round(size.parameters))
    return Network.of_size(size.parameters or 2.4e6, 49_152 if size.parameters > 5e7 else 4096)


def vocabulary_of(tokenizer: Size) -> int:
    """Entries of a tokenizer: as planned, else by the size of its files (about 60 bytes an entry), else 4,096."""
    planned = 0 if tokenizer.bytes else tokenizer.tokens
    return int(planned or tokenizer.bytes / 60) or 4096


def is_decoder(model: Size) -> bool:
    """Whether a model writes, as far as its config says."""
    return network_of(model).family not in LAYERS


def written(objective: Any, seq_len: int, family: str = "") -> int:
    """Tokens that an encoder-decoder writes for a row of `seq_len` that it reads; 0: as many."""
    if objective is None and family == "t5":
        objective = SpanCorruption()
    if not isinstance(objective, SpanCorruption):
        return 0
    rate, mean = objective.rate, objective.mean
    row = seq_len / (1 - rate + rate / mean)  # a sentinel stands for every span
    return math.ceil(row * rate * (1 + 1 / mean)) + 1


def with_generator(network: Network, shape: Architecture, share: float) -> Network:
    """A discriminator and ELECTRA's generator as one: as deep as if its narrower layers stood on top. They share the
    embeddings."""
    own = shape.generator(share).parameters - shape.vocab_size * shape.embedding_width
    return replace(network, layers=round(network.layers * (1 + share)), counted=network.parameters + own)


def row_of_conversations(batch: int, longest: int) -> int:
    """Tokens of the longest rows that come about where a batch of conversations is laid end to end in rows of about
    `AT_ONCE`: a batch fills k ± ½ rows, so that a row gets up to 1/2k more."""
    tokens = batch * min(longest, TOKENS_A_CONVERSATION)
    rows = max(1, round(tokens / AT_ONCE))
    return max(longest, round(min(AT_ONCE * (1 + 0.5 / rows), 1.5 * tokens)))


def on_card(execution: Execution) -> bool:
    """Whether the stage will run on an NVIDIA card."""
    return execution.device.startswith("cuda") or (execution.device == "auto" and bool(card()[0]))


def card_device() -> Device | None:
    """The data sheet of the card in this machine, where its name is in the table."""
    name = card()[0].lower().replace(" ", "")
    known = [device for key, device in devices().items() if key.split("-")[0].lower() in name]
    return max(known, key=lambda device: len(device.name), default=None) if name else None


def plan_of(
    network: Network, settings: TrainSettings, machine: Any, *, sequence: int, rows: int = 0, flops: float = 0.0,
    lora_rank: int = 0, packed: bool = False, written: int = 0, objective: Any = "tokens",
    at_once: int = 0, frozen: float = 0.0,
) -> Plan:  # fmt: skip
    """A stage's run as the estimates see it, with the execution that the machine carries.

    `rows` are those of a step (default: the settings' batch), `flops` the operations by which it is decided whether to
    compile (0: never unasked), `at_once` the tokens that a large model reads at once (0: all), `frozen` the
    parameters of other copies of the model.
    """
    execution: Execution = machine.execution or Execution()
    layout = execution.layout.resolve(execution.processes)
    each = max(1, (rows or settings.batch_size) // data_parallel(layout))
    micro = execution.micro_batch
    if not micro and at_once and network.parameters >= LARGE:
        micro = max(1, at_once // sequence)
    compiled = execution.compile == "on" or (execution.compile == "auto" and flops >= WORTH)
    return Plan(
        network, sequence, min(micro or each, each), "fp32" if settings.dtype == "float32" else "autocast",
        settings.optimizer, layout, accumulated=0 < micro < each, lora_rank=lora_rank, packed=packed,
        written=written, scores=0.0 if on_card(execution) else network.exact_scores,
        checkpointing=execution.activation_checkpointing == "on", compiled=compiled, objective=objective,
        frozen_models=frozen,
    )  # fmt: skip


def tuned(
    model: Size, rows: float, train: TrainSettings, machine: Any, *, lora_rank: int = 0, texts: float = 1,
    mean: int = TOKENS_A_CONVERSATION, objective: Any = "tokens", adapters: bool = False, packed: bool = False,
) -> Estimate:  # fmt: skip
    """What it takes to teach a model that exists `rows` rows of `texts` texts each, of about `mean` tokens.

    `adapters`: whether the stage could train one instead; `packed`: conversations laid end to end.
    """
    network = network_of(model)
    seen = train.steps * train.batch_size if train.steps else train.epochs * (rows or 2000)
    a_text = min(train.max_length, mean)
    tokens = seen * texts * a_text
    flops = flops_per_token(network.parameters, lora_rank > 0) * tokens
    row, count = train.max_length, train.batch_size
    if packed:
        row, count = row_of_conversations(count, row), max(1, round(count * a_text / AT_ONCE))
    plan = plan_of(
        network, train, machine, sequence=row, rows=count, flops=flops * packed, lora_rank=lora_rank, packed=packed,
        objective=objective, at_once=AT_ONCE,
    )  # fmt: skip
    return tuning_estimate(plan, model, machine, flops, adapters=adapters)


def tuning_estimate(
    plan: Plan, model: Size, machine: Any, flops: float, *, adapters: bool = False, rows: str = ROWS
) -> Estimate:
    """The estimate of a stage that teaches a model that exists, with `flops` operations."""
    parameters, seconds = plan.network.parameters, flops / rate(machine, "tune.flops", FLOPS)
    return estimate_of(
        plan, machine, flops=flops, seconds=(8 + 0.5 * seconds, 20 + 2.5 * seconds),
        disk=0.02 * parameters * 4 if plan.lora_rank else 4 * parameters,
        sizes={"": Size(parameters=parameters, bytes=4 * parameters, config=model.config)},
        adapters=adapters, rows=rows,
    )  # fmt: skip


def hungriest(found: Sequence[Estimate]) -> Estimate:
    """Of several trainings, one after another, the one that needs the most memory; with the operations of all."""
    most = max(found, key=lambda each: each.memory, default=Estimate((0, 0)))
    refused = next((each.too_large for each in found if each.too_large), None)
    return replace(most, flops=sum(each.flops for each in found), too_large=refused)


def surroundings(machine: Any) -> Surroundings:
    """What the process takes beside the model, as measured on this machine once it has been."""
    execution: Execution = machine.execution or Execution()
    if on_card(execution):
        return Surroundings.of("cuda")
    usual = Surroundings.of("cpu")
    return replace(usual, framework=machine.measured("train.framework") or usual.framework)


def available(machine: Any) -> float:
    """Bytes of memory for each process: the card's, or an equal share of the machine's."""
    execution: Execution = machine.execution or Execution()
    return card()[1] if on_card(execution) else machine.memory / execution.processes


def rate(machine: Any, name: str, default: float) -> float:
    """Operations a second: as measured here, else a share of the card's data sheet, else `default` a core."""
    execution: Execution = machine.execution or Execution()
    known = machine.measured(name)
    device = card_device() if not known and on_card(execution) else None
    if device is not None:
        return device.flops * UTILISATION * execution.processes
    return float(known or default * machine.cores)


def estimate_of(
    plan: Plan, machine: Any, *, flops: float, seconds: tuple[float, float], disk: float, sizes: Mapping[str, Size],
    beside: float = 0.0, adapters: bool = False, rows: str = ROWS,
) -> Estimate:  # fmt: skip
    """The estimate of a stage: `flops` of its training, `seconds` in all; `beside` are bytes that its other work holds
    when the training is over. `rows` names the key that says how many rows are read at once."""
    around = surroundings(machine)
    memory = memory_of(plan, around)
    total = max(memory.total, around.framework + memory.weights + beside)
    again = 4 / 3 if plan.checkpointing else 1.0
    execution: Execution = machine.execution or Execution()
    refusal = too_large(plan, around, available(machine), adapters=adapters, devices=_cards(execution), rows=rows)
    return Estimate(
        (seconds[0] * again, seconds[1] * again), (LOW * total, HIGH * total), disk, sizes,
        parts=dict(memory.parts()), flops=flops * again, available=available(machine),
        too_large=None if execution.memory_check == "off" else refusal,
    )  # fmt: skip


def _cards(execution: Execution) -> int:
    """Devices among which a run can be divided: dividing it on one machine's memory gains nothing."""
    from fledge.core.machine import graphics_cards

    return len(graphics_cards()) if on_card(execution) else 1
