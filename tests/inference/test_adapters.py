"""LoRA adapters by request: every row is what PEFT gives for its adapter alone, whatever stands beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from fledge.core.errors import FledgeError
from fledge.inference.adapted import AdaptedEngine
from fledge.inference.adapters import Adapters
from fledge.inference.engine import Delta, Request
from fledge.inference.lora import Adapter, LowRank
from fledge.inference.native import NativeEngine
from fledge.models.load import load_model
from fledge.models.save import save_model
from fledge.records.kinds import Message
from tests.inference import tiny

ATTENTION = ["q_proj", "v_proj"]
PROMPTS = [(5, 6, 7), tuple(range(10, 47)), (300,), (5, 6, 7), (80, 81, 82, 83, 84)]


def write_adapter(base: Path, folder: Path, seed: int, config: Any = None, template: str | None = None) -> Path:
    """A PEFT folder with noisy weights on the model in `base`."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model: Any = get_peft_model(load_model(base), config or LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    save_model(model, tiny.tokenizer(), folder, template, base)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"), tiny.llama())


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three forms of LoRA: attention alone; every layer, rank-stabilised; ranks by layer and the output layer too."""
    room = tmp_path_factory.mktemp("adapters")
    patterns = {"rank_pattern": {"layers.1.self_attn.k_proj": 7}, "alpha_pattern": {"down_proj": 3}}
    forms = {
        "law": {"target_modules": ATTENTION},
        "poems": {"target_modules": "all-linear", "use_rslora": True},
        "诗": {"target_modules": ["lm_head", "k_proj", "down_proj"], **patterns},
    }
    return {
        name: write_adapter(base, room / name, seed, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **form))
        for seed, (name, form) in enumerate(forms.items(), start=1)
    }


@pytest.fixture(scope="module")
def served(base: Path, folders: dict[str, Path]) -> Iterator[NativeEngine]:
    with NativeEngine.from_folder(base, device="cpu", adapters=folders) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(base: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """The model of every name in PEFT and transformers, nothing of ours."""
    models = {name: PeftModel.from_pretrained(load_model(base), folder).eval() for name, folder in folders.items()}
    return {"": load_model(base)} | models


def greedy(model: Any, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """transformers' own answer, from one prompt by itself."""
    with torch.no_grad():
        ids = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=3,
        )  # fmt: skip
    return tuple(ids[0, len(prompt) :].tolist())


def asking(prompt: tuple[int, ...], adapter: str, count: int = 12, **more: Any) -> Request:
    return Request(prompt_ids=prompt, adapter=adapter, temperature=0, max_new_tokens=count, stop_ids=(), **more)


def test_adapters_and_base_in_one_batch_answer_as_each_alone(served: NativeEngine, alone: dict[str, Any]) -> None:
    asked = [asking(prompt, name, logprobs=0) for prompt in PROMPTS for name in alone]
    results = served.generate(asked)
    told: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for request, result in zip(asked, results, strict=True):
        prompt = request.prompt_ids or ()
        assert result.choice.token_ids == greedy(alone[request.adapter], prompt, 12), request.adapter
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *result.choice.token_ids]])
            logprobs = alone[request.adapter](ids, use_cache=False).logits[0].log_softmax(-1)
        expected = logprobs[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0].tolist()
        assert [found.logprob for found in result.choice.logprobs] == pytest.approx(expected, abs=2e-5)
        told.setdefault(prompt, set()).add(result.choice.token_ids)
    assert all(len(answers) == len(alone) for answers in told.values())  # the adapters do change what is said


def test_the_order_and_the_company_change_nothing(served: NativeEngine) -> None:
    asked = [asking(prompt, name) for prompt in PROMPTS for name in ["", *served.adapters.names]]
    together = served.generate(asked)
    backwards = served.generate(asked[::-1])[::-1]
    by_itself = [served.generate([request])[0] for request in asked]
    for one, two, three in zip(together, backwards, by_itself, strict=True):
        assert one.choice.token_ids == two.choice.token_ids == three.choice.token_ids


def test_the_prefix_cache_is_kept_apart(base: Path, folders: dict[str, Path], alone: dict[str, Any]) -> None:
    prompt = tuple(range(20, 120))
    with NativeEngine.from_folder(base, device="cpu", adapters={"law": folders["law"]}) as engine:
        for name in ("", "law", "", "law"):
            assert engine.generate([asking(prompt, name)])[0].choice.token_ids == greedy(alone[name], prompt, 12)
        engine.remove_adapter("law")
        engine.add_adapter("law", folders["poems"])  # other weights under a name that the cache has seen
        assert engine.generate([asking(prompt, "law")])[0].choice.token_ids == greedy(alone["poems"], prompt, 12)


def test_scores_and_vectors_by_adapter(served: NativeEngine, alone: dict[str, Any]) -> None:
    prompts, continuations = [[5, 6, 7], [5, 6, 7], [40, 41]], [[8, 9], [10], [11, 12, 13]]
    for name, model in alone.items():
        for prompt, continuation, scored in zip(
            prompts, continuations, served.score(prompts, continuations, adapter=name), strict=True
        ):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + continuation]), use_cache=False).logits[0].log_softmax(-1)
            expected = logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(continuation)[:, None])[:, 0].tolist()
            assert list(scored.logprobs) == pytest.approx(expected, abs=2e-5)
        with torch.no_grad():
            ids = torch.tensor([served.encode("你好, world")])
            mean = model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        assert served.embed(["你好, world"], adapter=name)[0] == pytest.approx(mean.tolist(), abs=1e-4)


def test_an_engine_over_an_adapter_folder_answers_as_peft(folders: dict[str, Path], alone: dict[str, Any]) -> None:
    with NativeEngine.from_folder(folders["poems"], device="cpu") as engine:
        for prompt in PROMPTS:
            assert engine.generate([asking(prompt, "")])[0].choice.token_ids == greedy(alone["poems"], prompt, 12)


def test_gpt2_whose_weights_lie_the_other_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=330, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    base = tiny.save(tmp_path / "base", GPT2LMHeadModel(shape))
    layers = ["c_attn", "c_proj", "c_fc"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=layers, task_type="CAUSAL_LM", fan_in_fan_out=True)
    folder = write_adapter(base, tmp_path / "adapter", 4, config)
    model = PeftModel.from_pretrained(load_model(base), folder).eval()
    with NativeEngine.from_folder(base, device="cpu", adapters={"a": folder}) as engine:
        results = engine.generate([asking(PROMPTS[0], ""), asking(PROMPTS[0], "a"), asking(PROMPTS[4], "a")])
    assert [result.choice.token_ids for result in results] == [
        greedy(load_model(base), PROMPTS[0], 12), greedy(model, PROMPTS[0], 12), greedy(model, PROMPTS[4], 12)
    ]  # fmt: skip


# ---- what is refused, and what it does to others


def test_an_unknown_adapter_is_its_own_requests_error(served: NativeEngine, alone: dict[str, Any]) -> None:
    results = served.generate([asking(PROMPTS[0], "law"), asking(PROMPTS[0], "lwa"), asking(PROMPTS[0], "")])
    assert "lwa" in str(results[1].error) and 'did you mean "law"?' in str(results[1].error)
    assert results[0].choice.token_ids == greedy(alone["law"], PROMPTS[0], 12)
    assert results[2].choice.token_ids == greedy(alone[""], PROMPTS[0], 12)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(r=2, target_modules=ATTENTION, use_dora=True), "DoRA"),
        (LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["lm_head"]), "whole layers of its own"),
        (LoraConfig(r=2, target_modules=["embed_tokens"]), "no low-rank update of a linear layer"),
        (LoraConfig(r=2, target_modules=ATTENTION, bias="all"), "biases"),
        (LoraConfig(r=2, target_modules=ATTENTION, trainable_token_indices=[1, 2]), "trainable_token_indices"),
        (IA3Config(target_modules=ATTENTION, feedforward_modules=[]), "only LoRA"),
    ],
    ids=["DoRA", "whole modules", "embedding", "biases", "tokens", "IA3"],
)
def test_what_a_shared_batch_cannot_have(
    served: NativeEngine, base: Path, tmp_path: Path, config: Any, said: str
) -> None:
    config.task_type = "CAUSAL_LM"
    write_adapter(base, tmp_path / "adapter", 5, config)
    with pytest.raises(FledgeError, match=said) as caught:
        served.add_adapter("new", tmp_path / "adapter")
    assert "model.merge" in str(caught.value)
    assert "new" not in served.adapters.names


OTHERS = {"width": {"hidden_size": 32}, "depth": {"num_hidden_layers": 3}, "weights": {}}


@pytest.mark.parametrize("shape", OTHERS.values(), ids=OTHERS)
def test_an_adapter_of_another_base(
    served: NativeEngine, alone: dict[str, Any], tmp_path: Path, shape: dict[str, int]
) -> None:
    other = tiny.save(tmp_path / "other", tiny.llama(seed=7, **shape))
    folder = write_adapter(other, tmp_path / "adapter", 6)
    with pytest.raises(FledgeError, match="of another base"):
        served.add_adapter("new", folder)
    if shape:  # even where its base is gone: the shapes say it
        shutil.rmtree(other)
        with pytest.raises(FledgeError, match=r"of another base(.|\n)*layers"):
            served.add_adapter("new", folder)
    assert served.generate([asking(PROMPTS[0], "law")])[0].choice.token_ids == greedy(alone["law"], PROMPTS[0], 12)


def test_weights_that_are_no_numbers(served: NativeEngine, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["law"], tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 1] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(FledgeError, match="NaN"):
        served.add_adapter("new", folder)


def test_wrong_adapters_disturb_nobody_who_is_being_answered(
    served: NativeEngine, alone: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    other = write_adapter(tiny.save(tmp_path / "other", tiny.llama(seed=7)), tmp_path / "of another base", 6)
    broken = Path(shutil.copytree(folders["law"], tmp_path / "no numbers"))
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, broken / "adapter_model.safetensors")
    stream = served.stream(asking(PROMPTS[1], "law", 40))
    deltas = [next(stream)]
    for folder, said in ((other, "of another base"), (broken, "NaN"), (tmp_path, "not an adapter folder")):
        with pytest.raises(FledgeError, match=said):
            served.add_adapter("new", folder)
    deltas += stream
    assert sum((delta.token_ids for delta in deltas), ()) == greedy(alone["law"], PROMPTS[1], 40)


def test_a_copy_of_the_base_is_the_base(served: NativeEngine, base: Path, tmp_path: Path) -> None:
    folder = write_adapter(Path(shutil.copytree(base, tmp_path / "moved")), tmp_path / "adapter", 6)
    served.add_adapter("moved", folder)
    assert served.generate([asking(PROMPTS[0], "moved")])[0].error is None
    served.remove_adapter("moved")


def test_a_tokenizer_with_other_numbers(served: NativeEngine, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["law"], tmp_path / "adapter"))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(FledgeError, match="other token ids"):
        served.add_adapter("new", folder)


def test_names(served: NativeEngine, folders: dict[str, Path], base: Path) -> None:
    for name in ("law", "", "two words"):
        with pytest.raises(FledgeError, match="a name of its own"):
            served.add_adapter(name, folders["law"])
    with pytest.raises(FledgeError, match="not an adapter folder"):
        served.add_adapter("new", base)
    with pytest.raises(FledgeError, match="no adapter"):
        served.remove_adapter("new")


def test_removing_ends_its_own_requests_only(base: Path, folders: dict[str, Path], alone: dict[str, Any]) -> None:
    with NativeEngine.from_folder(base, device="cpu", adapters=folders) as engine:
        heard: dict[str, list[Delta | FledgeError]] = {"law": [], "poems": []}
        for name, list_ in heard.items():
            engine.submit(asking(PROMPTS[0], name, 200), list_.append)
        engine.remove_adapter("law")
        answered = engine.generate([asking(PROMPTS[0], "poems", 200)])[0]  # joins behind the others
        assert isinstance(heard["law"][-1], FledgeError) and "removed" in str(heard["law"][-1])
        assert answered.choice.token_ids == greedy(alone["poems"], PROMPTS[0], 200)
        told = [delta for delta in heard["poems"] if isinstance(delta, Delta)]
        assert tuple(id for delta in told for id in delta.token_ids) == answered.choice.token_ids


# ---- a model of its own name


def test_an_adapter_writes_chats_in_its_own_way(base: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    folder = write_adapter(base, tmp_path / "adapter", 8, template=template)
    chat = Request(messages=(Message("user", "Hello"),), temperature=0, max_new_tokens=4)
    with NativeEngine.from_folder(base, device="cpu", adapters={"terse": folder}) as engine:
        terse = AdaptedEngine(engine, "terse")
        assert terse.count(chat) == len(engine.encode("Hello")) + 2 < engine.count(chat)
        prompt = (1, *engine.encode("Hello"), 2)
        expected = engine.generate([asking(prompt, "terse", 4)])[0].choice.token_ids
        assert terse.generate([chat])[0].choice.token_ids == expected[: len(terse.generate([chat])[0].choice.token_ids)]
        assert terse.score([[5]], [[6]]) == engine.score([[5]], [[6]], adapter="terse") != engine.score([[5]], [[6]])
        with pytest.raises(FledgeError, match="no adapter"):
            AdaptedEngine(engine, "verbose")


# ---- the flat batch


def random_part(rank: int, inputs: int = 6, outputs: int = 10, bias: bool = False) -> LowRank:
    return LowRank(torch.randn(rank, inputs), torch.randn(outputs, rank), 0.5, torch.randn(outputs) if bias else None)


def test_rows_that_do_not_lie_together() -> None:
    """Against float64: rows of one adapter in two places, padding behind the last, two layers in one product."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(6, width, bias=False) for name, width in (("q", 10), ("k", 4))})
    adapters = Adapters(model)
    parts = {
        "a": {"q": random_part(2), "k": random_part(1, outputs=4)},
        "b": {"q": random_part(5, bias=True)},
        "c": {"k": random_part(3, outputs=4)},  # has no row in this step
    }
    for name, part in parts.items():
        adapters.add(Adapter(name, part, name))
    x = torch.randn(1, 12, 6)
    added = torch.zeros(12, 14, dtype=torch.float64)
    for row, owner in enumerate(["a", "b", "b", "", "", "", "a", "a", "b", "b", "", ""]):
        for first, name in ((0, "q"), (10, "k")):
            if owner and (part := parts[owner].get(name)) is not None:
                found = part.b.double() @ (part.a.double() @ x[0, row].double())
                added[row, first : first + len(found)] = 0.5 * (found if part.bias is None else found + part.bias)
    with torch.inference_mode(), adapters.rows([("a", 1), ("b", 2), ("", 3), ("a", 2), ("b", 2)]):
        assert adapters.active
        fused = torch.zeros(12, 14)
        adapters.add_product(fused, x[0], "q", "k")
        alone = model["q"](x)[0] - torch.nn.functional.linear(x[0], model["q"].weight)
    assert (fused.double() - added).abs().max() < 1e-5
    assert not fused[[3, 4, 5, 10, 11]].any()
    assert (alone.double() - added[:, :10]).abs().max() < 1e-5
    with torch.inference_mode():  # between steps nobody has a part
        assert not adapters.active
        assert torch.equal(model["q"](x), torch.nn.functional.linear(x, model["q"].weight))


def test_a_rows_bits_do_not_depend_on_its_company() -> None:
    """Neither on how many rows there are, nor on which other adapters are in the step."""
    torch.manual_seed(0)
    adapters = Adapters(torch.nn.ModuleDict({"q": torch.nn.Linear(64, 96)}))
    for name, rank in (("a", 8), ("b", 4), ("c", 16)):
        adapters.add(Adapter(name, {"q": random_part(rank, 64, 96)}, name))
    x = torch.randn(64, 64)

    def added(owners: list[str], rows: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), adapters.rows([(owner, 1) for owner in owners]):
            out = torch.zeros(len(rows), 96)
            adapters.add_product(out, rows, "q")
            return out

    alone = added(["b"] * 64, x)
    for rows in (1, 2, 3, 5, 7, 16, 33):
        assert torch.equal(added(["b"] * rows, x[:rows]), alone[:rows])
    for company in (["a"], ["a", "c"], ["", "c"], [""]):
        owners = ["b" if n % 3 else company[n // 3 % len(company)] for n in range(64)]
        ours = [n for n in range(64) if n % 3]
        assert torch.equal(added(owners, x)[ours], alone[ours])
