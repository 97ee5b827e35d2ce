"""The int8 folder: smaller, close to the model, readable by transformers alone, the same bytes every time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from fledge.compression.stages import Quantize
from fledge.core.artifact import Model, sha256_of
from fledge.core.errors import FledgeError
from fledge.models.adapters import LoRA, add_lora
from fledge.models.load import load_model, load_tokenizer
from fledge.models.save import save_model

Run = Callable[..., Any]
IDS = torch.arange(5, 69).reshape(2, 32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def rounded(weight: torch.Tensor) -> np.ndarray:
    """Row by row what int8 leaves of a matrix, in numpy: an independent reckoning."""
    values = weight.numpy().astype(np.float64)
    scale = np.abs(values).max(1, keepdims=True) / 127
    scale = torch.from_numpy(scale.astype(np.float32)).to(torch.bfloat16).double().numpy()
    return np.clip(np.round(values / scale), -128, 127) * scale


def test_weights_are_rounded_row_by_row_and_the_rest_is_kept_in_bfloat16(tied: Path, run: Run) -> None:
    made = run(Quantize(model="base"), model=Model(tied))
    before, after = load_model(tied), load_model(made.path)
    logits(after)  # compressed-tensors unpacks at the first forward pass
    for name, module in before.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            found = after.get_submodule(name).weight.detach().double().numpy()
            np.testing.assert_allclose(found, rounded(module.weight.detach()), rtol=1e-6, atol=1e-9)
    embedding = before.get_input_embeddings().weight.detach().to(torch.bfloat16).float()
    assert torch.equal(after.get_input_embeddings().weight.detach(), embedding)
    assert after.lm_head.weight.data_ptr() == after.get_input_embeddings().weight.data_ptr()


def test_the_folder_is_smaller_and_the_metrics_say_what_it_costs(tied: Path, run: Run) -> None:
    made = run(Quantize(model="base"), model=Model(tied))
    m, parameters = made.metrics, load_model(tied).num_parameters()
    size = (made.path / "model.safetensors").stat().st_size
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
    assert (m["parameters"], m["parameters_int8"], m["bytes_after"]) == (parameters, layers, size)
    assert size < layers + 2 * (parameters - layers) + 14 * 2 * 192 + 6_000  # a byte, two bytes, scales, the header
    assert m["bytes_before"] > 2.4 * m["bytes_after"]
    assert 0 < m["kl_nats_mean"] < 0.02 and m["kl_nats_mean"] < m["kl_nats_max"]
    p = torch.log_softmax(logits(load_model(tied)), -1)
    q = torch.log_softmax(logits(load_model(made.path)), -1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.02
    assert m["loss_after"] == pytest.approx(m["loss_before"], abs=0.05)


@pytest.mark.parametrize("rest", ["bfloat16", "float32"])
@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
def test_transformers_loads_it_without_us(tied: Path, untied: Path, run: Run, scheme: str, rest: str) -> None:
    for folder in (tied, untied):
        made = run(Quantize(model="base", scheme=scheme, rest=rest), model=Model(folder))
        theirs = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
        assert torch.equal(logits(theirs), logits(load_model(made.path)))
        with safe_open(made.path / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if "proj.weight" in name and "shape" not in name]  # noqa: SIM118
            kinds = {file.get_slice(name).get_dtype() for name in names}
        assert kinds == {"I32" if scheme == "int8" else "I8", "BF16" if rest == "bfloat16" else "F32"}


def test_w8a8_rounds_activations_too(tied: Path, run: Run) -> None:
    light, heavy = (run(Quantize(model="base", scheme=scheme), model=Model(tied)) for scheme in ("int8", "w8a8"))
    assert not torch.equal(logits(load_model(light.path)), logits(load_model(heavy.path)))
    assert heavy.metrics["kl_nats_mean"] > light.metrics["kl_nats_mean"]


def test_in_an_interpreter_without_fledge(tied: Path, run: Run) -> None:
    made = run(Quantize(model="base"), model=Model(tied))
    code = (
        "import sys; sys.modules['fledge'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))\n"
        "prompt = tokenizer('你好 hello', return_tensors='pt')\n"
        "print(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt['input_ids'].shape[1] :].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(made.path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, prompt = load_model(made.path, dtype="bfloat16"), load_tokenizer(made.path)("你好 hello", return_tensors="pt")
    written = ours.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert json.loads(done.stdout) == written.tolist()


def test_the_same_bytes_every_time(tied: Path, run: Run) -> None:
    one, two = (run(Quantize(model="base"), model=Model(tied)).path for _ in range(2))
    names = sorted(file.name for file in one.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert [sha256_of(one / name) for name in names] == [sha256_of(two / name) for name in names]


def test_it_is_refused_where_the_model_changes_too_much(tied: Path, run: Run) -> None:
    with pytest.raises(FledgeError, match="loses too much of the model"):
        run(Quantize(model="base", max_kl=1e-7), model=Model(tied))


def test_a_quantised_model_is_not_quantised_again(tied: Path, run: Run) -> None:
    made = run(Quantize(model="base"), model=Model(tied))
    with pytest.raises(FledgeError, match="quantised already"):
        run(Quantize(model="base"), model=made)


def test_nothing_left_to_quantise_is_an_error(tied: Path, run: Run) -> None:
    with pytest.raises(FledgeError, match="no layer is left"):
        run(Quantize(model="base", ignore=["re:.*proj"]), model=Model(tied))


def test_layers_can_be_left_out(tied: Path, run: Run) -> None:
    made = run(Quantize(model="base", ignore=["re:.*down_proj"]), model=Model(tied))
    with safe_open(made.path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight_packed"} <= names
    assert "lm_head" in json.loads((made.path / "config.json").read_text())["quantization_config"]["ignore"]


def test_an_adapter_is_merged_first(tied: Path, run: Run, tmp_path: Path) -> None:
    model = add_lora(load_model(tied, trainable=True), LoRA(rank=4), seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(3)).mul_(0.05)
    save_model(model, load_tokenizer(tied), tmp_path / "adapter", base=tied)
    made = run(Quantize(model="base"), model=Model(tmp_path / "adapter"))
    adapted, base = logits(load_model(tmp_path / "adapter")), logits(load_model(tied))
    small = logits(load_model(made.path))
    assert (small - adapted).abs().mean() < 0.1 * (base - adapted).abs().mean()
