"""What is said at the end of a run of what was predicted and what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from fledge.cli.view import forecasts
from fledge.evaluation.run_view import StageView

TOOK = {"measured_memory": 1_610_000_000, "predicted_memory": 1_680_000_000}
LASTED = {"measured_seconds": 720.0, "predicted_seconds": 660.0}


def stage(**outputs: Any) -> StageView:
    parts = {part.removeprefix("_"): {"kind": "model", "metrics": metrics} for part, metrics in outputs.items()}
    return StageView("base", "train.pretrain", "made", outputs=parts)


def test_a_training_tells_what_was_predicted_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = forecasts(stage(_={**TOOK, **LASTED, "shape": {"hidden": 64}}))
    assert line == "base: 1.6 GB of memory (predicted: 1.7 GB), 12 min 00 s of training (predicted: 11 min 00 s)"
    assert forecasts(stage(_=TOOK)) == ["base: 1.6 GB of memory (predicted: 1.7 GB)"], "shorter than twenty steps"
    assert forecasts(stage(_={"rows": 3})) == [], "no training"
    monkeypatch.setenv("FLEDGE_LANG", "zh")
    (line,) = forecasts(stage(_={**TOOK, **LASTED}))
    assert line == "base：内存 1.6 GB（预计 1.7 GB），训练 12 min 00 s（预计 11 min 00 s）"


def test_a_training_with_two_models_is_told_once_and_every_fold_by_itself() -> None:
    assert forecasts(stage(generator=TOOK, discriminator=TOOK)) == ["base: 1.6 GB of memory (predicted: 1.7 GB)"]
    first, second = forecasts(stage(_1=TOOK, _2={**TOOK, "measured_memory": 2e9}))
    assert first.startswith("base.1: 1.6 GB") and second.startswith("base.2: 2.0 GB")
