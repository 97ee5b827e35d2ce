"""`fledge estimate`: what a training would take, without a recipe; and how large a model a budget is for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fledge.cli.console import terminal
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.machine import Device, device_named
from fledge.core.store import home
from fledge.core.units import parse_count, show_bytes, show_count, show_seconds
from fledge.training.estimation.duration import UTILISATION, Price, cost_of, price_of, seconds_of
from fledge.training.estimation.fit import changes_that_fit
from fledge.training.estimation.flops import flops_per_token
from fledge.training.estimation.memory import CARD, Memory, inference_memory, memory_of, traffic_per_step
from fledge.training.estimation.network import Network
from fledge.training.estimation.optimal import BESIROGLU, by_ratio
from fledge.training.estimation.plan import Plan, devices_of, layout_named
from fledge.training.estimation.rules import rules_of


class CountType(click.ParamType):
    """`7B`, `1T`, `1e21`."""

    name = "NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return float(value)
        except ValueError:
            pass
        try:
            return float(parse_count(value))
        except ValueError as error:
            raise FledgeError(Problem(str(error), where=param.opts[0] if param else "", found=str(value))) from None


COUNT = CountType()


def estimate_options() -> list[click.Parameter]:
    """The flags of `fledge estimate`."""
    return [
        click.Option(["--parameters"], type=COUNT, help="size of the model, as in 7B (a LLaMA shape)"),
        click.Option(["--model"], help="or a model folder, or a shape by name: gpt3, llama-7b, …", metavar="MODEL"),
        click.Option(["--tokens"], type=COUNT, help="tokens to train on (default: 20 a parameter)"),
        click.Option(["--sequence"], type=COUNT, default="2048", show_default=True, help="tokens a row"),
        click.Option(["--micro-batch"], type=int, default=1, show_default=True, help="rows at once on a device"),
        click.Option(
            ["--precision"], type=click.Choice(["mixed", "autocast", "fp32", "bf16"]), default="mixed",
            show_default=True, help="which numbers are kept in which format",
        ),
        click.Option(["--optimizer"], default="adamw", show_default=True, help="adamw, adamw_8bit, muon, adafactor"),
        click.Option(["--lora"], type=int, default=0, help="rank of an adapter; the base is frozen", metavar="RANK"),
        click.Option(["--base-bits"], type=float, default=0, help="bits of a frozen base: 4.16 for QLoRA's NF4"),
        click.Option(["--checkpointing"], is_flag=True, help="activations are computed twice instead of being kept"),
        click.Option(["--layout"], default="ddp", show_default=True,
                     help="ddp, zero1, zero2, zero3, hsdp, tensor, pipeline, context"),
        click.Option(["--devices"], type=int, default=1, show_default=True, help="how many"),
        click.Option(["--device"], default="A100", show_default=True, help="which: H100, RTX4090, Ascend910B, …"),
        click.Option(["--mfu"], type=float, default=UTILISATION, show_default=True,
                     help="share of the peak that is reached, recomputation included: an assumption"),
        click.Option(["--price"], type=float, help="of a device and hour (default: prices.yaml)"),
        click.Option(["--context"], type=COUNT, default="0", help="tokens of a text when the model is used: KV cache"),
        click.Option(["--budget"], type=COUNT, help="operations: the best size and tokens for them, as in 1e21"),
        click.Option(["--hours"], type=float, help="or hours on the devices"),
        click.Option(["--detail"], is_flag=True, help="memory by part, and rules of thumb with what they leave out"),
        click.Option(["--json", "as_json"], is_flag=True, help="for programs"),
    ]  # fmt: skip


def estimate(**given: Any) -> None:
    """What a training would take: memory on each device, time, operations, money. Or, with --budget or --hours, how
    large a model and how many tokens a budget is for (Hoffmann et al., 2022).

    \b
      fledge estimate --parameters 7B --tokens 1T --layout zero3 --devices 64 --device H100 --price 2.5
      fledge estimate --budget 1e21
      fledge estimate --hours 24 --devices 8 --device H100
    """
    device = device_named(given["device"], home() / "devices.yaml")
    if not 0 < given["mfu"] <= 1:
        raise FledgeError(Problem(t("a share lies between 0 and 1"), where="--mfu", found=str(given["mfu"])))
    if given["budget"] or given["hours"]:
        found = _for_budget(given, device)
    elif given["parameters"] or given["model"]:
        found = _for_model(given, device)
    else:
        raise FledgeError(
            Problem(
                t("there is nothing to estimate"),
                allowed="--parameters, --model, --budget, --hours",
                fix=t("for example: {example}", example="fledge estimate --parameters 7B --tokens 1T --devices 64"),
            )
        )
    if given["as_json"]:
        click.echo(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        _print(found, terminal(), given["detail"])


def _for_model(given: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """Everything about one training, as plain values."""
    network = Network.named(given["model"]) if given["model"] else Network.of_size(given["parameters"])
    if given["model"] and given["parameters"]:
        network = replace(network, counted=round(given["parameters"]))
    layout, count = layout_named(given["layout"], given["devices"]), given["devices"]
    tokens = given["tokens"] or 20 * network.parameters
    plan = Plan(
        network, int(given["sequence"]), given["micro_batch"], given["precision"], given["optimizer"], layout,
        accumulated=True, lora_rank=given["lora"], base_bytes=given["base_bits"] / 8,
        checkpointing=given["checkpointing"],
    )  # fmt: skip
    memory = memory_of(plan, CARD)
    flops = tokens * flops_per_token(
        network, plan.sequence, frozen_base=bool(plan.lora_rank), recompute=plan.checkpointing, trained=plan.trained
    )
    bits = 32 if plan.precision == "fp32" else 16
    seconds = seconds_of(flops, device, count, given["mfu"], bits)
    fits = memory.total <= device.memory
    changes = [] if fits else changes_that_fit(plan, CARD, device.memory, adapters=True, devices=0)
    context = given["context"] or plan.sequence
    return {
        "parameters": network.parameters, "trained_parameters": round(plan.trained), "tokens": tokens,
        "shape": _shape(network), "precision": plan.precision, "layout": given["layout"], "devices": devices_of(layout),
        "device": device.name, "mfu": given["mfu"], "flops": flops, "seconds": seconds,
        "memory": {"total": memory.total, **dict(memory.parts())}, "device_memory": device.memory, "fits": fits,
        "changes": [{"change": change.what, "memory": change.memory} for change in changes],
        "inference_memory": dict(inference_memory(network, context).parts()), "context": context,
        "traffic_per_step": traffic_per_step(plan), "money": _money(given, device, seconds, count),
        "optimal": _optimal(6 * network.parameters * tokens),
        "rules": [vars(rule) for rule in rules_of(plan, tokens)],
    }  # fmt: skip


def _for_budget(given: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """The best size for a budget of operations, or of hours on devices."""
    count = given["devices"]
    flops = given["budget"] or given["hours"] * 3600 * count * device.flops * given["mfu"]
    seconds = seconds_of(flops, device, count, given["mfu"])
    return {
        "flops": flops, "seconds": seconds, "devices": count, "device": device.name, "mfu": given["mfu"],
        "optimal": _optimal(flops), "money": _money(given, device, seconds, count),
    }  # fmt: skip


def _optimal(flops: float) -> dict[str, Any]:
    """(N, D) by both approaches, and the loss that the parametric fit expects there."""
    ratio, fit = by_ratio(flops), BESIROGLU.optimal(flops)
    return {
        "20 tokens a parameter": {"parameters": ratio[0], "tokens": ratio[1], "loss": BESIROGLU.loss(*ratio)},
        "Besiroglu et al. (2024)": {"parameters": fit[0], "tokens": fit[1], "loss": BESIROGLU.loss(*fit)},
    }


def _money(given: Mapping[str, Any], device: Device, seconds: float, count: int) -> dict[str, Any] | None:
    price = (
        Price(given["price"], source="--price")
        if given["price"] is not None
        else price_of(device.name, home() / "prices.yaml")
    )
    return None if price is None else {**vars(price), "total": cost_of(seconds, count, price)}


def _shape(network: Network) -> str:
    return (
        f"{network.layers} × {network.hidden}, {network.heads}/{network.kv_heads} × {network.head_dim}, "
        f"{network.intermediate}, {network.vocabulary}"
    )


def _print(found: Mapping[str, Any], console: Console, detail: bool) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(found):
        table.add_row(name, value)
    console.print(table)
    if detail and "memory" in found:
        console.print(parts_table(Memory(**{k: v for k, v in found["memory"].items() if k != "total"})))
        console.print(_rules_table(found["rules"]))
    if "memory" in found and not detail:
        console.print(t("--detail shows the memory by part, and rules of thumb with what they leave out"), style="dim")


def _lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The short answer, a line each."""
    lines = []
    if "memory" in found:
        lines.append((t("parameters"), f"{found['parameters']:,}  ({found['shape']})"))
        verdict = t("fits") if found["fits"] else t("does not fit")
        size, has = show_bytes(found["memory"]["total"]), show_bytes(found["device_memory"])
        lines.append((t("memory"), t("{size} on each device ({has}): {verdict}", size=size, has=has, verdict=verdict)))
        lines += [("", f"→ {change['change']}: {show_bytes(change['memory'])}") for change in found["changes"]]
        lines.append((t("tokens"), show_count(found["tokens"])))
    lines.append((t("operations"), f"{found['flops']:.3g}"))
    lines.append((t("time"), t(
        "{time} on {count} × {device} at {mfu}% of their peak (an assumption: --mfu)", time=_long(found["seconds"]),
        count=found["devices"], device=found["device"], mfu=f"{100 * found['mfu']:.0f}",
    )))  # fmt: skip
    lines.append((t("money"), _money_line(found["money"])))
    if "memory" in found:
        cache = found["inference_memory"]
        lines.append((t("to use it"), t(
            "{weights} of weights in 16 bits, {cache} of KV cache for a text of {tokens} tokens",
            weights=show_bytes(cache["weights"]), cache=show_bytes(cache["buffers"]), tokens=f"{found['context']:,.0f}",
        )))  # fmt: skip
    lines += [
        (t("best for the budget"), f"{t(name)}: {show_count(best['parameters'])} × {show_count(best['tokens'])} "
         + t("tokens, loss {loss}", loss=f"{best['loss']:.2f}"))
        for name, best in found["optimal"].items()
    ]  # fmt: skip
    return lines


def _money_line(money: Mapping[str, Any] | None) -> str:
    if money is None:
        return t("no price is known: --price, or {file}", file=home() / "prices.yaml")
    line = f"{money['total']:,.0f} {money['currency']} ({money['hourly']:g} / h, {money['source']})"
    hint = t("an example, not an offer: --price, or {file}", file=home() / "prices.yaml")
    return f"{line}; {hint}" if money["example"] else line


def _long(seconds: float) -> str:
    """Days where hours are too many."""
    days = seconds / 86_400
    return t("{days} days", days=f"{days:,.1f}") if days >= 2 else show_seconds(seconds)


def parts_table(memory: Memory) -> Table:
    """Memory by part on each device."""
    table = Table(box=None, pad_edge=False, header_style="dim", title=t("memory by part"), title_justify="left")
    table.add_column(t("part"))
    table.add_column(t("bytes"), justify="right")
    table.add_column("%", justify="right")
    for name, size in (*memory.parts(), ("total", memory.total)):
        table.add_row(t(name), show_bytes(size), f"{100 * size / memory.total:.0f}")
    return table


def _rules_table(rules: list[dict[str, Any]]) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="dim", title="\n" + t("rules in circulation"), title_justify="left"
    )
    for title in (t("rule"), t("it says"), t("here"), t("what it leaves out")):
        table.add_column(title, overflow="fold")
    shows = {"bytes": show_bytes, "parameters": show_count, "operations": lambda value: f"{value:.3g}"}
    for rule in rules:
        show = shows[rule["unit"]]
        table.add_row(rule["name"], show(rule["theirs"]), show(rule["ours"]), rule["leaves_out"])
    return table


def needs_table(plan: Any) -> Table | None:
    """The trainings of a recipe's plan: operations, memory on each device, and whether that fits; None without one."""
    steps = [step for step in plan.to_make if step.estimate.parts]
    if not steps:
        return None
    table = Table(
        box=None, pad_edge=False, header_style="dim", title="\n" + t("trainings"), title_justify="left"
    )  # fmt: skip
    for title in (t("stage"), t("operations"), t("memory on each device"), t("there is"), ""):
        table.add_column(title, justify="right" if title else "left")
    for step in steps:
        found = step.estimate
        low, high = found.memory
        verdict = t("fits") if high <= found.available else t("tight") if low <= found.available else t("does not fit")
        size = f"{show_bytes(low)} – {show_bytes(high)}"
        table.add_row(step.name, f"{found.flops:.2g}", size, show_bytes(found.available), verdict)
    return table


def plan_details(plan: Any) -> list[Table]:
    """A table of memory by part for every training of a plan."""
    tables = []
    for step in plan.to_make:
        if step.estimate.parts:
            table = parts_table(Memory(**step.estimate.parts))
            table.title = f"\n{step.name}: " + t("memory by part")
            tables.append(table)
    return tables
