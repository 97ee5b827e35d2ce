"""What the training stages need, as `fledge plan` shows it: memory by part, operations, whether it fits. Light."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fledge.core.machine import Device, card, devices
from fledge.core.stage import Estimate, Execution, Size
from fledge.training.estimation.duration import UTILISATION
from fledge.training.estimation.fit import too_large
from fledge.training.estimation.memory import Plan, Surroundings, data_parallel, memory_of
from fledge.training.estimation.network import Network
from fledge.training.settings import TrainSettings

LOW, HIGH = 0.87, 1.15  # of the estimate: what the range says
WORTH = 3e13  # operations from which `training.compiling` compiles on its own: a test holds them equal
LARGE, AT_ONCE = 50_000_000, 1024  # parameters from which `training.tuning` takes few rows at once; so many tokens

TOKENS_A_CONVERSATION = 150  # where nothing is known


def network_of(size: Size) -> Network:
    """The shape of a model that a stage is given: its `config.json`, or a LLaMA shape of about its size."""
    if size.config:
        return Network.of_config(size.config, round(size.parameters))
    return Network.of_size(size.parameters or 2.4e6, 49_152 if size.parameters > 5e7 else 4096)


def vocabulary_of(tokenizer: Size) -> int:
    """Entries of a tokenizer: as planned, else by the size of its files (about 60 bytes an entry), else 4,096."""
    planned = 0 if tokenizer.bytes else tokenizer.tokens
    return int(planned or tokenizer.bytes / 60) or 4096


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
    network: Network, settings: TrainSettings, machine: Any, *, sequence: int, flops: float = 0.0, lora_rank: int = 0,
    packed: bool = False, objective: Any = "tokens", tuning: bool = False, frozen: float = 0.0,
) -> Plan:  # fmt: skip
    """A stage's run as the estimates see it, with the execution that the machine carries."""
    execution: Execution = machine.execution or Execution()
    layout = execution.layout.resolve(execution.processes)
    rows = max(1, settings.batch_size // data_parallel(layout))
    micro = execution.micro_batch
    if not micro and tuning and network.parameters >= LARGE:
        micro = max(1, AT_ONCE // sequence)
    compiled = not tuning and (execution.compile == "on" or (execution.compile == "auto" and flops >= WORTH))
    return Plan(
        network, sequence, min(micro or rows, rows), "fp32" if settings.dtype == "float32" else "autocast",
        settings.optimizer, layout, accumulated=bool(micro) and micro < rows, lora_rank=lora_rank, packed=packed,
        checkpointing=execution.activation_checkpointing == "on", compiled=compiled, objective=objective,
        frozen_models=frozen,
    )  # fmt: skip


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
    beside: float = 0.0, adapters: bool = False,
) -> Estimate:  # fmt: skip
    """The estimate of a stage: `flops` of its training, `seconds` in all; `beside` are bytes that its other work holds
    when the training is over."""
    around = surroundings(machine)
    memory = memory_of(plan, around)
    total = max(memory.total, around.framework + memory.weights + beside)
    again = 4 / 3 if plan.checkpointing else 1.0
    execution: Execution = machine.execution or Execution()
    refusal = too_large(plan, around, available(machine), adapters=adapters, devices=_cards(execution))
    return Estimate(
        (seconds[0] * again, seconds[1] * again), (LOW * total, HIGH * total), disk, sizes,
        parts=dict(memory.parts()), flops=flops * again, available=available(machine),
        too_large=None if execution.memory_check == "off" else refusal,
    )  # fmt: skip


def _cards(execution: Execution) -> int:
    """Devices among which a run can be divided: dividing it on one machine's memory gains nothing."""
    from fledge.core.machine import graphics_cards

    return len(graphics_cards()) if on_card(execution) else 1
