"""`train.pretrain` with every objective and `train.continue`, as the runner calls them: what they write and measure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    pipeline,
)

from fledge.core.artifact import Adapter, Artifact, Documents, Model, Tokenizer, files_of, sha256_of
from fledge.core.errors import FledgeError
from fledge.core.events import Emitter
from fledge.core.job import Job
from fledge.core.stage import Execution
from fledge.data.tokens.packer import identity_of
from fledge.data.tokens.stages import Pack, TrainTokenizer
from fledge.records.kinds import Document
from fledge.records.shards import ShardWriter
from fledge.training.stages import Continue, Pretrain

Run = Callable[..., Any]
ENGLISH = "The cat sat on the mat. The dog ran to the house. Who has seen the bird? "
CHINESE = "你好，人民法院依法作出判决。今天天气很好！我们去北京大学。"
STILL = {"hidden": 0.0, "attention": 0.0}
LAW = "当事人应当在法定期限内提起诉讼。人民法院应当受理。"


def write(folder: Path, texts: list[str]) -> Path:
    with ShardWriter(folder, "documents") as shards:
        for text in texts:
            shards.write(Document(text))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Texts, tokenizers for every objective, and the models of earlier tests by name."""
    root = tmp_path_factory.mktemp("world")
    made: dict[str, Artifact] = {
        "en": Documents(write(root / "en", [ENGLISH * (2 + i % 3) for i in range(40)])),
        "zh": Documents(write(root / "zh", [CHINESE * (2 + i % 3) for i in range(40)])),
        "law": Documents(write(root / "law", [LAW * (2 + i % 3) for i in range(40)])),
    }
    for objective in ("causal", "masked", "span_corruption"):
        folder = root / objective
        (folder / "work").mkdir(parents=True)
        stage = TrainTokenizer(data=["en", "zh", "law"], vocab_size=420, objective=objective)
        job = Job("t", folder / "out", folder / "work", 0, Execution(), Emitter("t", 0, lambda e: None), made)
        (folder / "out").mkdir()
        made[objective] = Tokenizer(stage.run(job).path)
    return made


def stage(objective: Any, family: str, tokenizer: str = "masked", **changes: Any) -> Pretrain:
    given: dict[str, Any] = {
        "data": ["en", "zh"], "tokenizer": tokenizer, "tokens": 40_000, "seq_len": 64, "objective": objective,
        "model": {"family": family, "hidden": 32, "layers": 2, "heads": 4, "context": 128, "dropout": {"hidden": 0.0}},
        "train": {"batch_size": 16, "lr": 0.01, "optimizer": "adamw", "log_every": 10, "dtype": "float32"},
        "held_out": {"en": "en", "zh": "zh"}, "held_out_bytes": "1kB",
    }  # fmt: skip
    return Pretrain(**{**given, **changes})


def digests(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in files_of(folder)}


def loads(auto: Any, folder: Path) -> Any:
    """The model as transformers opens it, with nothing missing and nothing made up."""
    model, about = auto.from_pretrained(folder, output_loading_info=True)
    assert not about["missing_keys"] and not about["mismatched_keys"], about
    return model.eval()


def test_a_masked_model_fills_masks_from_its_folder(run: Run) -> None:
    watched = {"batch_size": 16, "lr": 0.01, "optimizer": "adamw", "dtype": "float32", "evaluate_every": 50}
    shape = {"family": "bert", "hidden": 64, "layers": 2, "heads": 4, "context": 128, "dropout": STILL}
    made = run(stage("masked", "bert", tokens=100_000, model=shape, train=watched))
    metrics = made.metrics
    for code in ("en", "zh"):
        assert metrics[f"masked_nll_{code}"] < 0.35 * metrics[f"untrained_masked_nll_{code}"]
        assert metrics[f"masked_accuracy_{code}"] > 0.5
    assert 0 < metrics["best_held_out_loss"] < 3 and metrics["best_step"] == 50, "measured on the way"
    assert math.isclose(metrics["untrained_masked_nll_en"], math.log(420), abs_tol=0.5), "uniform at first"
    loads(AutoModelForMaskedLM, made.path)
    fill = pipeline("fill-mask", model=str(made.path))
    for text, within in ((ENGLISH, " sat"), (CHINESE, "依法")):
        ids = fill.tokenizer(text, add_special_tokens=False)["input_ids"]
        words = [fill.tokenizer.decode(i) for i in ids]
        at = next(place for place, word in enumerate(words) if word in within or within in word)
        hidden = "".join([*words[:at], fill.tokenizer.mask_token, *words[at + 1 :]])
        assert fill(hidden)[0]["token"] == ids[at], (hidden, fill(hidden)[:3])
    ids = fill.tokenizer("hello")["input_ids"]
    assert ids[0] == ids[-1] == fill.tokenizer.cls_token_id == fill.tokenizer.sep_token_id, "as in training"


def test_whole_words_and_the_families_of_encoders(run: Run) -> None:
    short = {"batch_size": 8, "lr": 0.01, "optimizer": "adamw", "dtype": "float32"}
    for number, family in enumerate(("roberta", "electra", "deberta-v2", "deberta-v3")):
        made = run(stage({"masked": {"whole_word": True}}, family, tokens=12_000, train=short), f"family{number}")
        model = loads(AutoModelForMaskedLM, made.path)
        assert made.metrics["masked_nll_en"] < made.metrics["untrained_masked_nll_en"] - 1
        assert type(model).__name__.endswith("ForMaskedLM")


def test_electra_is_saved_as_each(run: Run) -> None:
    asked = stage("replaced_token", "electra", tokens=40_000)
    assert asked.output_kinds() == {"generator": Model, "discriminator": Model}
    made = run(asked)
    assert set(made) == {"generator", "discriminator"}
    generator = loads(AutoModelForMaskedLM, made["generator"].path)
    discriminator = loads(AutoModelForPreTraining, made["discriminator"].path)
    assert type(discriminator).__name__ == "ElectraForPreTraining"
    assert generator.config.hidden_size < discriminator.config.hidden_size == 32
    same = (model.electra.embeddings.word_embeddings.weight for model in (generator, discriminator))
    assert torch.equal(*same), "they share their embeddings"
    metrics = made["discriminator"].metrics
    assert metrics["parameters"] == discriminator.num_parameters()
    assert metrics["replaced_token_generator_en"] < 0.6 * metrics["untrained_replaced_token_generator_en"]
    assert metrics["replaced_token_discriminator_en"] < 0.7 * metrics["untrained_replaced_token_discriminator_en"]
    assert {"accuracy", "f1", "precision", "recall", "replaced"} <= {
        name.removeprefix("replaced_token_").removesuffix("_zh") for name in metrics if name.endswith("_zh")
    }
    assert (made["generator"].path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("objective", "family", "tokenizer"),
    [("span_corruption", "t5", "span_corruption"), ("denoising", "bart", "masked")],
)
def test_encoder_decoders(run: Run, objective: str, family: str, tokenizer: str) -> None:
    made = run(stage(objective, family, tokenizer, tokens=40_000))
    for code in ("en", "zh"):
        assert made.metrics[f"{objective}_nll_{code}"] < 0.6 * made.metrics[f"untrained_{objective}_nll_{code}"]
        assert made.metrics[f"{objective}_accuracy_{code}"] > 0.3
    model, names = loads(AutoModelForSeq2SeqLM, made.path), AutoTokenizer.from_pretrained(made.path)
    if family == "t5":
        assert model.config.decoder_start_token_id == names.pad_token_id
        asked = names("The cat sat on<extra_id_0>.", return_tensors="pt").input_ids
        assert asked[0, -1] == names.eos_token_id and names.convert_tokens_to_ids("<extra_id_0>") in asked[0].tolist()
    else:
        assert model.config.decoder_start_token_id == names.eos_token_id
        asked = names("The cat sat on[MASK].", return_tensors="pt").input_ids
    found = model.generate(asked, max_new_tokens=12, do_sample=False)
    assert found.shape[1] > 2


def test_the_same_stage_gives_the_same_bytes(run: Run) -> None:
    for number, (objective, family) in enumerate((("masked", "bert"), ("denoising", "bart"))):
        asked = stage(objective, family, tokens=3000, held_out={}, model={
            "family": family, "hidden": 32, "layers": 1, "heads": 4, "context": 64})  # fmt: skip
        first, second = (run(asked, f"{which}{number}") for which in ("first", "second"))
        assert digests(first.path) == digests(second.path)


def test_a_tokenizer_without_the_marks_is_refused(run: Run) -> None:
    with pytest.raises(FledgeError, match="no mask token"):
        run(stage("masked", "bert", "causal"), "a")
    with pytest.raises(FledgeError, match="too few sentinels"):
        run(stage("span_corruption", "t5", "masked"), "b")


# --- going on --------------------------------------------------------------------------------------------------------


def going_on(**changes: Any) -> Continue:
    given: dict[str, Any] = {
        "data": ["law"], "tokens": 12_000, "seq_len": 64, "held_out": {"law": "law"}, "general": {"en": "en"},
        "held_out_bytes": "1kB", "train": {"lr": 5e-3, "batch_size": 8, "dtype": "float32"},
    }  # fmt: skip
    return Continue(**{**given, **changes})


def test_a_causal_model_goes_on_with_its_own_tokenizer(run: Run, world: dict[str, Artifact], tmp_path: Path) -> None:
    shape = {"hidden": 32, "layers": 2, "head_dim": 8}
    base = run(stage("causal", "llama", "causal", model=shape, tokens=24_000), "base")
    world["base"] = base
    learned = run(going_on(model="base"), "learned")
    metrics = learned.metrics
    assert metrics["bits_per_byte_law"] < 0.6 * metrics["before_bits_per_byte_law"]
    assert metrics["before_bits_per_byte_general_en"] == pytest.approx(base.metrics["bits_per_byte_en"], rel=1e-5)
    assert metrics["bits_per_byte_general_en"] > metrics["before_bits_per_byte_general_en"], "and what that costs"
    assert len({identity_of(made.path) for made in (learned, base, world["causal"])}) == 1

    packed = run(Pack(data=["law"], tokenizer="causal", seq_len=64), "packed")
    world["packed"] = packed
    from_rows = run(going_on(model="base", data=["packed"], tokens=2000), "rows")
    assert from_rows.metrics["bits_per_byte_law"] < from_rows.metrics["before_bits_per_byte_law"]
    world["others"] = run(Pack(data=["law"], tokenizer="masked", seq_len=64), "others")
    with pytest.raises(FledgeError, match="another tokenizer"):
        run(going_on(model="base", data=["others"]), "refused")
    loads(AutoModelForCausalLM, learned.path)

    replayed = run(going_on(model="base", replay={"data": ["en", "zh"], "share": 0.5}), "replayed")
    assert replayed.metrics["bits_per_byte_general_en"] < metrics["bits_per_byte_general_en"], "replay keeps it"
    assert replayed.metrics["bits_per_byte_law"] < 0.7 * replayed.metrics["before_bits_per_byte_law"]

    asked = going_on(model="base", lora={"rank": 4}, tokens=2000)
    assert asked.output_kinds() == {"": Adapter} and type(run(asked, "adapter")) is Adapter
    with pytest.raises(FledgeError, match="does not fit"):
        run(going_on(model="base", objective="masked"), "wrong")
    with pytest.raises(FledgeError, match="longer than the model"):
        run(going_on(model="base", seq_len=256), "long")


def test_a_masked_model_goes_on_as_what_it_is(run: Run, world: dict[str, Artifact]) -> None:
    short = {"batch_size": 8, "lr": 0.01, "optimizer": "adamw", "dtype": "float32"}
    for number, (objective, family, tokenizer, auto) in enumerate(
        (
            ("masked", "deberta-v3", "masked", AutoModelForMaskedLM),
            ("span_corruption", "t5", "span_corruption", AutoModelForSeq2SeqLM),
        )
    ):
        world["start"] = run(stage(objective, family, tokenizer, tokens=12_000, train=short), f"start{number}")
        made = run(going_on(model="start", replay={"data": ["en"], "share": 0.25}), f"on{number}")
        assert made.metrics[f"{objective}_nll_law"] < made.metrics[f"before_{objective}_nll_law"] - 0.5
        before, after = (
            made.metrics[f"before_{objective}_nll_general_en"],
            world["start"].metrics[f"{objective}_nll_en"],
        )
        assert before == pytest.approx(after, rel=1e-4), "its table of absolute positions has come with it"
        loads(auto, made.path)
    json.dumps(made.metrics)
