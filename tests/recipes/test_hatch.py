"""`recipes/hatch.yaml` made small, as a user runs it: every stage, the report, caching, kills, golden outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fledge.core.artifact import digest_of
from fledge.core.store import Store
from fledge.records.kinds import to_row
from fledge.records.shards import kind_in, read
from tests.recipes.small import HATCH, fledge, manifests, random_points, recipe, run, run_with_kills

GOLDEN = Path(__file__).parent / "golden.json"
TEXT_STAGES = ("dialogues", "laws", "talk", "text", "talk_split", "text_split", "tokenizer")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hatch")


@pytest.fixture(scope="module")
def shown(home: Path) -> dict[str, Any]:
    return run("hatch", HATCH, home)


@pytest.fixture(scope="module")
def paths(shown: dict[str, Any]) -> dict[str, Path]:
    return {stage["name"]: Path(stage["path"]) for stage in shown["stages"]}


def test_every_stage_is_made_and_pretraining_says_what_was_asked(shown: dict[str, Any]) -> None:
    assert {stage["status"] for stage in shown["stages"]} == {"made"}
    base = next(stage for stage in shown["stages"] if stage["use"] == "train.pretrain")
    for language in ("en", "zh"):
        model, untrained = (base["metrics"][f"{kind}bits_per_byte_{language}"] for kind in ("", "untrained_"))
        assert 0 < model < untrained
        assert 1 < base["metrics"][f"xz_bits_per_byte_{language}"] < 8


def test_the_report_is_there_with_models_samples_and_curves(shown: dict[str, Any], home: Path) -> None:
    report = (home / "runs" / "hatch" / "report.html").read_text(encoding="utf-8")
    for words in ("bits per byte", "画蛇添足", "aligned", "<svg", "xz"):
        assert words in report


def test_again_is_under_three_seconds_and_makes_nothing(shown: dict[str, Any], home: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (home / "artifacts").rglob("artifact.json")}
    best = 60.0
    for _ in range(2):
        started = time.monotonic()
        output = fledge("run", "recipes/hatch.yaml", *(f"--set={s}" for s in HATCH), home=home)
        best = min(best, time.monotonic() - started)
    assert "everything is there" in output
    assert before == {p: p.stat().st_mtime_ns for p in (home / "artifacts").rglob("artifact.json")}
    assert best < 3


def test_what_is_made_is_as_it_was_made(shown: dict[str, Any], home: Path) -> None:
    assert "every file is as it was made" in fledge("show", "hatch", "--verify", home=home)


def test_killed_stages_go_on_and_end_with_the_same_bytes(paths: dict[str, Path], tmp_path: Path) -> None:
    points = {"talk": 2, "base": 4, "preferences": 2, "aligned": 2}
    killed_paths, killed = run_with_kills(recipe("hatch", HATCH), Store(tmp_path / "killed"), points)
    assert sorted(killed) == sorted(points)
    whole, again = manifests(paths), manifests(killed_paths)
    assert {n: m["payload"] for n, m in again.items()} == {n: m["payload"] for n, m in whole.items()}


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(3))
def test_twenty_random_kills(paths: dict[str, Path], tmp_path: Path, seed: int) -> None:
    small = recipe("hatch", HATCH)
    killed_paths, killed = run_with_kills(small, Store(tmp_path / "killed"), random_points(small, 7, seed))
    assert len(killed) >= 5
    whole, again = manifests(paths), manifests(killed_paths)
    assert {n: m["payload"] for n, m in again.items()} == {n: m["payload"] for n, m in whole.items()}


def test_a_changed_output_needs_a_new_version(paths: dict[str, Path]) -> None:
    """Golden outputs: text stages to the byte, trained ones to three digits (kernels differ between processors).

    When a change is meant, raise the stage's `version` and write the file anew: FLEDGE_WRITE_GOLDEN=1 pytest …
    """
    found = {name: _golden(name, paths[name], manifest) for name, manifest in manifests(paths).items()}
    if os.environ.get("FLEDGE_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert set(found) == set(golden)
    for name, entry in found.items():
        same_version = (entry["use"], entry["version"]) == (golden[name]["use"], golden[name]["version"])
        assert same_version, f"{name}: a new version; write the golden file anew"
        assert entry["values"] == pytest.approx(golden[name]["values"], rel=2e-3), (
            f"{name}: another output, same version"
        )
        assert entry.get("content") == golden[name].get("content"), f"{name}: another output under the same version"


def _content(folder: Path) -> str:
    """A digest of what a folder says, its rows or its vocabulary: Parquet's bytes name the library's release."""
    if (folder / "tokenizer.json").is_file():
        return digest_of(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"])
    kind = kind_in(folder)
    return digest_of([to_row(record) for record in read(folder, kind)])


def _golden(name: str, path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    entry = {"use": manifest["use"], "version": manifest["version"], "values": {}}
    if name in TEXT_STAGES:
        entry["content"] = {part: _content(path / output["path"]) for part, output in manifest["outputs"].items()}
    elif "" in manifest["outputs"]:
        metrics = manifest["outputs"][""]["metrics"]
        wanted = ("final_loss", "bits_per_byte", "answer_loss", "parameters", "tokens")
        entry["values"] = {
            key: round(value, 4)
            for key, value in metrics.items()
            if isinstance(value, (int, float)) and key.startswith(wanted) and "per_second" not in key
        }
    return entry


def test_transformers_alone_loads_what_was_made(paths: dict[str, Path]) -> None:
    code = f"""
import sys
sys.modules["fledge"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
for folder in ({str(paths["base"])!r}, {str(paths["aligned"])!r}, {str(paths["int8"])!r}):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{{"role": "user", "content": "你好"}}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    logits = model(**tokenizer(text, return_tensors="pt")).logits
    assert logits.shape[-1] >= len(tokenizer) - 8 and bool(torch.isfinite(logits).all())
AutoModelForSequenceClassification.from_pretrained({str(paths["reward"])!r}, num_labels=1)
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)
    assert done.stdout.strip().endswith("loaded"), done.stderr[-2000:]


def test_every_stage_runs_on_its_own_on_raw_files(paths: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [{"instruction": f"Say number {n}, please.", "output": f"The number is {n}. 数字是{n}。"} for n in range(40)]
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    out = tmp_path / "tuned"
    fledge(
        "train", "sft", "--model", str(paths["base"]), "--data", str(data), "--train.steps", "2", "--threads", "1",
        "--compile", "off", "--out", str(out), home=tmp_path / "home",
    )  # fmt: skip
    assert (out / "model.safetensors").is_file() and (out / "chat_template.jinja").is_file()
    assert "conversations: 40 rows" in fledge("data", "inspect", str(data), home=tmp_path / "home")
    answer = subprocess.run(
        [sys.executable, "-m", "fledge.cli.main", "generate", str(out)],
        input='{"prompt": "Say number 3, please.", "max_tokens": 4}\n', text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert json.loads(answer.stdout)["text"] is not None, answer.stderr
