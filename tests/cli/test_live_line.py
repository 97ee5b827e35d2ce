"""The live line of a stage that trains."""

from __future__ import annotations

import pytest

from fledge.cli.console import StageLine
from fledge.core.events import Event


def test_it_shows_speed_utilisation_and_the_losses_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fledge.cli.console.time.monotonic", lambda: now[0])
    line = StageLine("base", started=100.0)
    for step in (10, 20):
        now[0] += 5
        speed = {"total": 40, "loss": 3.0, "tokens_per_second": 15_900.0, "mfu": 0.412}
        line.hear(Event("progress", "base", name="steps", value=step, data=speed))
        for name, value in (("loss", 4.0 - step / 20), ("loss/en", 2.5), ("loss/zh", 3.5)):
            line.hear(Event("metric", "base", step=step, name=name, value=value))
    text = line.text()
    assert "20 / 40 steps  50%  2/s  10 s left  15.9k tokens/s  MFU 41%  █▁ 3.000  en 2.500  zh 3.500" in text
    monkeypatch.setenv("FLEDGE_LANG", "zh")
    assert "每秒 15.9k 词元" in line.text()
