"""How long a training takes and what it costs: operations over what the devices get done, devices times hours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.machine import Device

UTILISATION = 0.40
"""Share of the peak that is reached where nothing is measured. Published runs: 0.21 (GPT-3), 0.46 (PaLM, 540 B),
0.38 to 0.43 (Llama 3, 405 B); small models on one card often reach less."""


@dataclass(frozen=True)
class Price:
    """What a device costs an hour, and where that is from."""

    hourly: float
    currency: str = "USD"
    source: str = ""
    example: bool = False
    """out of the table that comes with fledge: an example with a date, not an offer"""


def seconds_of(
    flops: float, device: Device, devices: int = 1, utilisation: float = UTILISATION, bits: int = 16
) -> float:
    """Seconds for `flops` operations (recomputed ones included) at a share of the devices' peak."""
    return flops / (devices * device.peak(bits) * utilisation)


def cost_of(seconds: float, devices: int, price: Price) -> float:
    """What so many devices cost for so long."""
    return seconds / 3600 * devices * price.hourly


def price_of(device: str, own: Path | None = None) -> Price | None:
    """The price of a device: from the user's table, else from the dated example that comes with fledge, else None."""
    for file, example in ((own, False), (Path(__file__).with_name("prices.yaml"), True)):
        if file is None or not file.is_file():
            continue
        table = _read(file)
        for name, value in table.get("hourly", {}).items():
            if str(name).lower() == device.lower():
                source = f"{table.get('source', file.name)}, {table.get('as_of', '')}".rstrip(", ")
                return Price(float(value), str(table.get("currency", "USD")), source, example)
    return None


def _read(file: Path) -> dict[str, Any]:
    import yaml

    table = yaml.safe_load(file.read_text(encoding="utf-8"))
    prices = table.get("hourly") if isinstance(table, dict) else None
    if not isinstance(prices, dict) or not all(isinstance(value, int | float) for value in prices.values()):
        raise FledgeError(
            Problem(
                t("a table of prices names devices and what they cost an hour"),
                where=str(file),
                allowed="{as_of: 2024-12, source: …, currency: USD, hourly: {H100: 2.5}}",
            )
        )
    return table
