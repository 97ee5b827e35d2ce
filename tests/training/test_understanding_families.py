"""Every family with a head in transformers: what a task is taught to is what the saved folder answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from fledge.core.job import Job
from fledge.core.stage import Execution
from fledge.models.adapters import LoRA
from fledge.models.save import save_model
from fledge.training.objective import as_batch
from fledge.training.objectives.contrastive import embed
from fledge.training.objectives.sequence_classification import head_logits
from fledge.training.settings import TrainSettings
from fledge.training.understanding.examples import Example, collate
from fledge.training.understanding.opening import TaskHead, open_task
from tests.training.toys import tokenizer

WIDE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
KEYS = {"num_key_value_heads": 2, "max_position_embeddings": 64}
POSITIONS = {"max_position_embeddings": 66}
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, {**WIDE, **KEYS}),
    "mistral": (AutoModelForCausalLM, {**WIDE, **KEYS, "head_dim": 8, "sliding_window": 4}),
    "qwen2": (AutoModelForCausalLM, {**WIDE, **KEYS}),
    "qwen3": (AutoModelForCausalLM, {**WIDE, **KEYS, "head_dim": 8}),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}),
    "bloom": (AutoModelForCausalLM, {"hidden_size": 32, "n_layer": 1, "n_head": 4}),
    "glm": (AutoModelForCausalLM, {**WIDE, **KEYS, "head_dim": 8}),
    "bert": (AutoModelForMaskedLM, {**WIDE, **POSITIONS}),
    "roberta": (AutoModelForMaskedLM, {**WIDE, **POSITIONS}),
    "electra": (AutoModelForMaskedLM, {**WIDE, **POSITIONS, "embedding_size": 32}),
    "deberta-v2": (AutoModelForMaskedLM, {**WIDE, **POSITIONS, "relative_attention": True, "pos_att_type": ["c2p"]}),
    "t5": (AutoModelForSeq2SeqLM, {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}),
    "bart": (AutoModelForSeq2SeqLM, {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, **POSITIONS,
    }),
}  # fmt: skip
NO_TAGGER = {"bart"}
SENTENCE = ["hello there", "你好，人民法院", "you are here you are here"]


def base(family: str, folder: Path) -> Any:
    """A tiny language model of a family, saved."""
    auto, shape = SHAPES[family]
    names = tokenizer()
    special = {"pad_token_id": 3, "eos_token_id": 0, "bos_token_id": 0, "decoder_start_token_id": 3}
    torch.manual_seed(0)
    whole = auto.from_config(AutoConfig.for_model(family, vocab_size=len(names), **shape, **special))
    save_model(whole, names, folder)
    return whole


@pytest.mark.parametrize("family", SHAPES)
def test_a_saved_task_answers_as_it_did(family: str, tmp_path: Path) -> None:
    whole = base(family, tmp_path / "base")
    heads: dict[TaskHead, Any] = {
        "sequence": AutoModelForSequenceClassification, "tokens": AutoModelForTokenClassification, "body": AutoModel,
    }  # fmt: skip
    for head, plain in heads.items():
        if (head == "tokens" and family in NO_TAGGER) or (head == "body" and whole.config.is_encoder_decoder):
            continue
        policy = open_task(tmp_path / "base", head, ["a", "b", "c"] if head != "body" else [], TrainSettings(), 1)
        encode = policy.encoder(48)
        batch = as_batch(collate([Example(ids) for ids in encode(SENTENCE)], policy.pad_id))
        folder = tmp_path / head
        policy.save(Job("x", folder, folder, 0, Execution(), None), {})  # type: ignore[arg-type]
        again = plain.from_pretrained(folder).eval()
        policy.model.eval()
        with torch.no_grad():
            if head == "body":
                ours, theirs = embed(policy.model, batch, "mean"), embed(again, batch, "mean")
            else:
                ours, theirs = head_logits(policy.model, batch), head_logits(again, batch)
                assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
                if head == "sequence":  # alone, without padding
                    row = batch["input_ids"][:1, : int(batch["attention_mask"][0].sum())]
                    torch.testing.assert_close(again(input_ids=row).logits[0], ours[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bert", "deberta-v2", "t5"])
def test_an_adapter_goes_with_the_whole_head(family: str, tmp_path: Path) -> None:
    base(family, tmp_path / "base")
    policy = open_task(
        tmp_path / "base", "sequence", ["a", "b", "c"], TrainSettings(dtype="float32"), 1, lora=LoRA(rank=2)
    )
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    heads = [name for name in trained if "lora_" not in name]
    assert heads and len(heads) < len(trained) and all("modules_to_save" in name for name in heads)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    job = Job("x", tmp_path / "out", tmp_path / "out", 0, Execution(), None)  # type: ignore[arg-type]
    policy.save(job, {})
    config = AutoConfig.from_pretrained(tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", config=config)
    again = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    batch = as_batch(collate([Example(ids) for ids in policy.encoder(48)(SENTENCE)], policy.pad_id))
    with torch.no_grad():
        ours, theirs = head_logits(policy.model.eval(), batch), head_logits(again, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert float((ours[0] - ours[1]).abs().max()) > 1e-3, "and it says something"
