"""Folders and the engines they need; vectors as the folder's pooling says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaModel

from fledge.core.errors import FledgeError
from fledge.inference.embedding import EmbeddingEngine
from fledge.inference.engine import Request
from fledge.inference.native import NativeEngine
from fledge.inference.opening import kind_of, open_engine
from fledge.models.adapters import LoRA, add_lora
from fledge.models.load import load_model
from fledge.models.save import save_model
from tests.inference import tiny

TEXTS = ["Hello", "你好，世界！很高兴见到你", "a", "hello how can I help you today the and"]


def bert() -> BertConfig:
    torch.manual_seed(0)
    return BertConfig(
        vocab_size=330, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=3, initializer_range=0.2,
    )  # fmt: skip


def say(folder: Path, **keys: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return folder


def test_kinds(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m", tiny.llama())
    plain = {"pooling": None, "is_encoder_decoder": False}
    for name, more, kind in (
        ("LlamaForCausalLM", {}, "decoder"), ("GPT2LMHeadModel", {}, "decoder"), ("LlamaModel", {}, "vectors"),
        ("LlamaForSequenceClassification", {}, "decoder"), ("BertForMaskedLM", {}, "vectors"),
        ("LlamaForCausalLM", {"pooling": "last"}, "vectors"),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "encoder-decoder"),
    ):  # fmt: skip
        assert kind_of(say(folder, architectures=[name], **(plain | more))) == kind


def test_a_decoder_is_opened_natively(tmp_path: Path) -> None:
    with open_engine(tiny.save(tmp_path / "m", tiny.llama()), device="cpu") as engine:
        assert isinstance(engine, NativeEngine)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_vectors_as_training_makes_them(tmp_path: Path, family: str, pooling: str) -> None:
    """Against `train.embed`'s own function, row by row."""
    from fledge.training.objectives.contrastive import embed

    model = LlamaModel(tiny.llama().config) if family == "llama" else BertModel(bert())
    folder = say(tiny.save(tmp_path / "m", model.eval()), pooling=pooling)
    with open_engine(folder, device="cpu") as engine:
        assert isinstance(engine, EmbeddingEngine)
        vectors = torch.tensor(engine.embed(TEXTS))
        for text, vector in zip(TEXTS, vectors, strict=True):
            ids = torch.tensor([engine.encode(text)])
            with torch.no_grad():
                expected = embed(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, pooling)[0]
            assert (vector - expected).abs().max() < 1e-6
            assert (torch.tensor(engine.embed([text])[0]) - vector).abs().max() < 1e-6  # whatever else is in the batch


def test_vectors_of_an_adapter(tmp_path: Path) -> None:
    """As `train.embed` writes them with `lora`: the adapter on a base that writes, its config beside it."""
    base = tiny.save(tmp_path / "base", tiny.llama())
    model: Any = add_lora(load_model(base, head="body"), LoRA(rank=4), 1, "FEATURE_EXTRACTION")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    save_model(model, tiny.tokenizer(), tmp_path / "adapter", base=base)
    model.config.pooling = "last"
    model.config.save_pretrained(tmp_path / "adapter")
    with open_engine(tmp_path / "adapter", device="cpu") as engine, torch.no_grad():
        assert isinstance(engine, EmbeddingEngine)
        hidden = model.eval()(torch.tensor([engine.encode(TEXTS[1])])).last_hidden_state[0, -1]
        assert engine.embed([TEXTS[1]])[0] == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-6)


def test_an_encoder_that_predicts_masks_gives_means(tmp_path: Path) -> None:
    model = BertForMaskedLM(bert()).eval()
    with open_engine(tiny.save(tmp_path / "m", model), device="cpu") as engine:
        vectors = engine.embed(TEXTS)
        for text, vector in zip(TEXTS, vectors, strict=True):
            with torch.no_grad():
                hidden = model.bert(torch.tensor([engine.encode(text)])).last_hidden_state[0]
            assert vector == pytest.approx(hidden.mean(0).tolist(), abs=1e-5)
        with pytest.raises(FledgeError, match="longer than"):
            engine.embed(["你" * 40])
        with pytest.raises(FledgeError, match="empty"):
            engine.embed(["a", ""])
        assert "writes none" in str(engine.generate([Request(text="x")])[0].error)
        for call in (lambda: engine.score([[5]], [[6]]), lambda: engine.count(Request(text="x"))):
            with pytest.raises(FledgeError, match="writes none"):
                call()
    with pytest.raises(FledgeError, match="decoder-only"):
        open_engine(tmp_path / "m", device="cpu", adapters={"a": tmp_path})


@pytest.mark.parametrize(("key", "row"), [("pooling_mode_cls_token", 0), ("pooling_mode_lasttoken", -1)])
def test_folders_of_sentence_transformers(tmp_path: Path, key: str, row: int) -> None:
    model = BertModel(bert()).eval()
    folder = tiny.save(tmp_path / "m", model)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"type": f"models.{kind}", "path": f"{n}_{kind}" if n else ""} for n, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": False, key: True}))
    with open_engine(folder, device="cpu") as engine:
        with torch.no_grad():
            hidden = model(torch.tensor([engine.encode(TEXTS[1])])).last_hidden_state[0, row]
        assert engine.embed([TEXTS[1]])[0] == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-6)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(FledgeError, match="pooling_mode_max_tokens"):
        open_engine(folder, device="cpu")
