"""A Trainer's live weights: after every step the engine says what transformers' `generate` says of the live model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fledge.core.errors import FledgeError
from fledge.inference.engine import Delta, Request
from fledge.inference.native import NativeEngine
from fledge.models.adapters import LoRA, add_lora
from tests.inference import tiny

PROMPTS = [tuple(range(5, 45)), (300, 7), (80, 81, 82)]


def asking(prompt: tuple[int, ...], count: int = 10) -> Request:
    return Request(prompt_ids=prompt, temperature=0, max_new_tokens=count, stop_ids=())


def greedy(model: Any, prompt: tuple[int, ...], count: int = 10) -> tuple[int, ...]:
    training = model.training
    model.eval()
    with torch.no_grad():
        ids = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=3,
        )  # fmt: skip
    model.train(training)
    return tuple(ids[0, len(prompt) :].tolist())


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(4, 330, (4, 16), generator=torch.Generator().manual_seed(seed))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def whole() -> Any:
    return tiny.llama()


def tied() -> Any:
    return tiny.llama(tie_word_embeddings=True)


def with_lora() -> Any:
    return add_lora(tiny.llama(), LoRA(rank=4, alpha=16, rslora=True), seed=1)


def with_dora() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True))


@pytest.mark.parametrize("make", [whole, tied, with_lora, with_dora])
def test_after_each_step_the_engine_says_what_the_model_says(make: Callable[[], Any]) -> None:
    model = make().train()
    kinds = [type(module) for module in model.modules()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    said = []
    with NativeEngine.follow(model, tiny.tokenizer()) as engine:
        for number in range(4):
            if number:
                step(model, optimizer, number)
                assert engine.live.stale
                spent = engine.refresh()
                assert spent.times == 1 and spent.seconds > 0
            assert not engine.live.stale
            results = engine.generate([asking(prompt) for prompt in PROMPTS])
            said.append([result.choice.token_ids for result in results])
            assert said[-1] == [greedy(model, prompt) for prompt in PROMPTS]
        assert engine.live.spent.times == 3
    assert len({tuple(answers) for answers in said}) == 4  # every step changed something
    assert model.training and [type(module) for module in model.modules()] == kinds


def test_what_training_puts_around_a_model_stays_there() -> None:
    """A compiled wrapper, checkpointed activations, inputs that want gradients: nothing of it reaches the engine."""
    model = add_lora(tiny.llama(), LoRA(rank=4), seed=1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    with NativeEngine.follow(torch.compile(model.train()), tiny.tokenizer()) as engine:
        for number in range(2):
            step(model, optimizer, number)
            engine.refresh()
            assert engine.generate([asking(PROMPTS[0])])[0].choice.token_ids == greedy(model, PROMPTS[0])
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_lora_in_fp32_on_a_base_in_bf16() -> None:
    """How adapters are trained in 16 bits: what the engine scores is what PEFT computes, to the precision of bf16."""
    model = add_lora(tiny.llama(initializer_range=0.1).bfloat16(), LoRA(rank=4), seed=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    with NativeEngine.follow(model, tiny.tokenizer()) as engine:
        before = engine.score([PROMPTS[0]], [PROMPTS[2]])[0].logprobs
        step(model.train(), optimizer, 1)
        engine.refresh()
        found = engine.score([PROMPTS[0]], [PROMPTS[2]])[0].logprobs
    ids = torch.tensor([[*PROMPTS[0], *PROMPTS[2]]])
    with torch.no_grad():
        logprobs = model.eval()(ids, use_cache=False).logits[0].float().log_softmax(-1)
    expected = logprobs[len(PROMPTS[0]) - 1 : -1].gather(-1, torch.tensor(PROMPTS[2])[:, None])[:, 0].tolist()
    assert list(found) == pytest.approx(expected, abs=0.05)
    assert max(abs(a - b) for a, b in zip(found, before, strict=True)) > 0.2


def test_replaced_parameters_are_taken_over() -> None:
    model, other = tiny.llama(), tiny.llama(seed=5)
    with NativeEngine.follow(model, tiny.tokenizer()) as engine:
        before = engine.generate([asking(PROMPTS[0])])[0].choice.token_ids
        model.load_state_dict(other.state_dict(), assign=True)
        engine.refresh()
        after = engine.generate([asking(PROMPTS[0])])[0].choice.token_ids
    assert before != after == greedy(other, PROMPTS[0])


def test_refreshing_waits_or_refuses_while_requests_are_on_their_way() -> None:
    model = tiny.llama()
    with NativeEngine.follow(model, tiny.tokenizer()) as engine:
        expected = greedy(model, PROMPTS[0], 150)
        heard: list[Delta | FledgeError] = []
        engine.submit(asking(PROMPTS[0], 150), heard.append)
        with pytest.raises(FledgeError, match="on their way"):
            engine.refresh()
        engine.refresh(wait=True)  # returns behind the last token
        told = [delta for delta in heard if isinstance(delta, Delta)]
        assert told[-1].finish_reason == "length"
        assert tuple(id for delta in told for id in delta.token_ids) == expected
        assert engine.live.spent.times == 1


def test_an_engine_with_weights_of_its_own_follows_nobody(engine: NativeEngine) -> None:
    with pytest.raises(FledgeError, match="follows no model"):
        engine.refresh()


def test_adapters_by_request_do_not_stand_on_a_model_that_moves(tmp_path: Any) -> None:
    with NativeEngine.follow(tiny.llama(), tiny.tokenizer()) as engine, pytest.raises(FledgeError, match="is trained"):
        engine.add_adapter("a", tmp_path)
