"""What stands on top of a model: found in its folder, asked for, new where it must be, refused where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fledge.core.errors import FledgeError
from fledge.models.build import build_model
from fledge.models.families import FAMILIES
from fledge.models.load import context_of, load_model
from fledge.models.save import save_model
from fledge.models.shape import ModelShape
from tests.training.toys import tokenizer


def saved(family: str, folder: Path, head: Any = "lm", **given: Any) -> tuple[Any, Path]:
    names = tokenizer()
    shape = ModelShape(family=family, hidden=32, layers=1, heads=4, context=20, **given).resolve(len(names))
    model = build_model(shape, 3, names, head=head, labels=3)
    save_model(model, names, folder / family)
    return model, folder / family


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_folder_says_what_stands_on_top(family: str, tmp_path: Path) -> None:
    model, folder = saved(family, tmp_path)
    loaded = load_model(folder)
    assert type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert context_of(loaded.config) == 20


@pytest.mark.parametrize("head", ["sequence", "tokens"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "electra", "deberta-v3", "t5"])
def test_a_classifier_is_built_kept_and_put_on_a_language_model(family: str, head: Any, tmp_path: Path) -> None:
    model, folder = saved(family, tmp_path / "classifier", head)
    loaded = load_model(folder)
    assert type(loaded) is type(model) and loaded.config.num_labels == 3
    _, language = saved(family, tmp_path / "language")
    first, second = (load_model(language, head=head, labels=4) for _ in range(2))
    assert type(first) is type(model) and first.config.num_labels == 4
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    ids = torch.tensor([[5, 6, 7, 8, 0]])  # T5 reads its sentence where the text ends, at id 0
    assert first(ids).logits.shape[-1] == 4


def test_only_the_head_may_be_new(tmp_path: Path) -> None:
    _, folder = saved("bert", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for head in (None, "sequence"):
        with pytest.raises(FledgeError, match=r"layer\.0\.output\.dense"):
            load_model(folder, head=head)


def test_a_head_that_a_family_has_not_is_refused(tmp_path: Path) -> None:
    _, folder = saved("xglm", tmp_path)
    with pytest.raises(FledgeError, match="xglm: masked"):
        load_model(folder, head="masked")
    with pytest.raises(FledgeError, match="tokens: xglm"):
        saved("xglm", tmp_path / "other", "tokens")


def test_electra_is_saved_as_each_of_its_two(tmp_path: Path) -> None:
    names = tokenizer()
    shape = ModelShape(family="electra", hidden=32, layers=1, heads=4, context=20).resolve(len(names))
    for name, part in (("discriminator", shape), ("generator", shape.generator(0.5))):
        save_model(build_model(part, 0, names), names, tmp_path / name)
    assert type(load_model(tmp_path / "discriminator")).__name__ == "ElectraForPreTraining"
    assert type(load_model(tmp_path / "generator")).__name__ == "ElectraForMaskedLM"


def test_dropout_of_a_checkpoint_is_what_is_asked_for(tmp_path: Path) -> None:
    model, folder = saved("gpt2", tmp_path)
    assert model.transformer.h[0].attn.resid_dropout.p == 0.1
    loaded: Any = load_model(folder, dropout={"attention": 0.0, "hidden": 0.3})
    block = loaded.transformer.h[0]
    assert (block.attn.attn_dropout.p, block.mlp.dropout.p, loaded.transformer.drop.p) == (0.0, 0.3, 0.1)
    with pytest.raises(FledgeError, match=r"dropout\.activation"):
        load_model(folder, dropout={"activation": 0.1})


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_padding_id_anywhere_in_the_vocabulary_does_no_harm(family: str) -> None:
    names = tokenizer()
    names.pad_token = names.convert_ids_to_tokens(299)
    shape = ModelShape(family=family, hidden=32, layers=1, heads=4, context=20).resolve(len(names), pad_id=299)
    model = build_model(shape, 0, names).eval()
    assert model.num_parameters() == shape.parameters
    ids = torch.arange(5, 25)[None]
    given = {"decoder_input_ids": ids} if shape.kind == "encoder-decoder" else {}
    changed = ids.clone()
    changed[0, 1] = 40
    with torch.no_grad():
        assert not torch.equal(model(ids, **given).logits[0, 1], model(changed, **given).logits[0, 1])
