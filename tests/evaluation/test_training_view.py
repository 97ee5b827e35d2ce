"""What the report shows of a training: losses by source in one figure, layers over steps as maps."""

from __future__ import annotations

import re
from pathlib import Path

from fledge.core.events import Event
from fledge.evaluation import figures
from fledge.evaluation.report import _training, write_report
from fledge.evaluation.run_view import RunView, StageView


def run() -> RunView:
    """A training of twelve steps with two sources and statistics of three layers."""
    events = []
    for step in range(1, 13):
        values = {
            "loss": 4 / step, "nll": 4 / step, "loss/law": 5 / step, "loss/en": 3 / step, "mfu": 0.4, "data_wait": 0.01,
            "memory": 1e9, "memory_peak": 1.2e9, "grad_norm": 1 / step, "grad_norm/embeddings": 0.1,
            "grad_norm/00": 10.0 ** -(step / 4), "grad_norm/01": 1.0, "grad_norm/rest": float("nan"),
            "activation_mean/00": -0.5, "activation_mean/01": 0.25, "dead/00": 0.0, "dead/01": 0.001, "zeros/01": 0.5,
        }  # fmt: skip
        events += [Event("metric", "base", 0, step, name, value) for name, value in values.items()]
    stage = StageView("base", "train.pretrain", "made", 3.0, metrics={"mfu": 0.4, "steps": 12})
    return RunView("curves", stages=[stage], events=events)


def test_every_measure_has_its_figure_in_both_languages() -> None:
    (training,) = _training(run())
    titles = [(figure.title.en, figure.title.zh) for figure in training.figures]
    assert titles == [
        ("Loss", "损失"), ("Loss by source", "各来源的损失"), ("Gradient norm", "梯度范数"),
        ("Model FLOPs utilisation", "模型算力利用率（MFU）"), ("Time spent waiting for batches", "等待批次的时间"),
        ("Memory", "内存"), ("Gradient norm by layer", "各层的梯度范数"),
        ("Activations by layer, mean", "各层激活值的均值"),
        ("Zeros behind the activation function by layer", "各层激活函数之后的零值比例"),
    ]  # fmt: skip
    by_source = training.figures[1]
    assert [str(name.en) for _, name in by_source.legend] == ["English", "law"]
    layered = training.figures[6]
    assert layered.note is not None
    assert "faint is 0.001, strong is 1" in layered.note.en and "E: embeddings" in layered.note.en
    assert "最淡为 0.001" in layered.note.zh and "E：词嵌入" in layered.note.zh
    assert dict((name.en, text.en) for name, text in training.facts)["model FLOPs utilisation, per cent"] == "40"


def opacities(svg: str) -> list[float]:
    """Of the fields of a map, in the order in which they were drawn."""
    fields = re.findall(r"<path[^>]*style=\"fill: var\(--s1\)[^\"]*\"", svg)
    return [float(found[1]) if (found := re.search(r"opacity: ([\d.]+)", field)) else 1.0 for field in fields]


def test_a_map_is_the_stronger_the_larger_the_value() -> None:
    rows = {"00": {1: 0.01, 2: 0.1, 3: 1.0}, "01": {1: 1.0, 3: 0.1}}
    svg, low, high = figures.heat("map", rows, log=True)
    assert (low, high) == (0.01, 1.0)
    found = opacities(svg)
    assert len(found) == 5, "a value that is missing leaves its field empty"
    assert found == [*sorted(found[:3]), 1.0, found[1]] and found[0] < 0.1 and abs(found[1] - 0.525) < 0.02
    wide, *_ = figures.heat("wide", {"00": {step: float(step) for step in range(1000)}})
    assert len(opacities(wide)) <= figures.MOST_COLUMNS and "999" in wide
    empty, low, high = figures.heat("none", {"00": {1: float("nan")}})
    assert (low, high) == (0.0, 0.0) and opacities(empty) == []


def test_the_page_is_written_without_scores(tmp_path: Path) -> None:
    write_report(run(), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "各来源的损失" in text and "Loss by source" in text and "base-grad-norm-layers" in text
