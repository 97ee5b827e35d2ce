"""T5 and BART behind the engine's protocol: transformers' `generate` says what greedy answers are."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from fledge.core.errors import FledgeError
from fledge.inference.encoder_decoder import EncoderDecoderEngine
from fledge.inference.engine import Constraint, Delta, PromptTooLong, Request
from fledge.inference.opening import open_engine
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Conversation, Message
from tests.inference import tiny

PROMPTS = [(5, 6, 7), tuple(range(10, 47)), (300,), (80, 81, 82, 83, 84), (9, 9, 9, 9)]


def t5(**shape: Any) -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=330, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        n_positions=64, pad_token_id=3, eos_token_id=0, decoder_start_token_id=3, initializer_factor=1.0, **shape,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():  # random T5 repeats one token: let its attention matter more
        for name, parameter in model.named_parameters():
            if "EncDecAttention" in name or "SelfAttention" in name:
                parameter.mul_(3)
    return model


def bart() -> Any:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=330, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, dropout=0.0,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.3,
        pad_token_id=3, bos_token_id=1, eos_token_id=0, decoder_start_token_id=0,
        forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    model.generation_config.forced_bos_token_id = 1
    return model


MODELS = {
    "t5": t5,
    "t5 gated, untied": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": bart,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def engine(model: Any) -> Iterator[EncoderDecoderEngine]:
    tokenizer = tiny.tokenizer()
    with EncoderDecoderEngine(model, tokenizer, ChatRenderer(tokenizer), max_rows=4) as made:
        yield made


def greedy(model: Any, prompt: tuple[int, ...], count: int, eos: int | None = None, **more: Any) -> tuple[int, ...]:
    """transformers' own answer, from one prompt by itself, without the decoder's start token."""
    ids = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count, do_sample=False, num_beams=1, eos_token_id=eos, **more,
    )  # fmt: skip
    return tuple(ids[0, 1:].tolist())


def asking(prompt: tuple[int, ...], count: int = 16, **more: Any) -> Request:
    return Request(prompt_ids=prompt, max_new_tokens=count, **({"temperature": 0, "stop_ids": ()} | more))


def test_greedy_answers_are_those_of_generate(engine: EncoderDecoderEngine, model: Any) -> None:
    results = engine.generate([asking(prompt) for prompt in PROMPTS])  # five of them, four rows at once
    assert [result.choice.token_ids for result in results] == [greedy(model, prompt, 16) for prompt in PROMPTS]
    assert [result.prompt_tokens for result in results] == [len(prompt) for prompt in PROMPTS]
    assert {result.choice.finish_reason for result in results} == {"length"}
    assert len({result.choice.token_ids for result in results}) > 1


def test_rows_of_different_lengths_leave_the_batch(engine: EncoderDecoderEngine, model: Any) -> None:
    asked = [asking(prompt, count) for prompt, count in zip(PROMPTS, (3, 20, 1, 9, 14), strict=True)]
    for request, result in zip(asked, engine.generate(asked), strict=True):
        assert result.choice.token_ids == greedy(model, request.prompt_ids or (), request.max_new_tokens or 0)


def test_penalties_are_those_of_generate(engine: EncoderDecoderEngine, model: Any) -> None:
    found = engine.generate([asking(PROMPTS[1], repetition_penalty=1.7)])[0].choice.token_ids
    assert found == greedy(model, PROMPTS[1], 16, repetition_penalty=1.7)


def test_the_models_own_end_and_stop_strings(engine: EncoderDecoderEngine) -> None:
    drawn = {"temperature": 1.0, "seed": 4}
    whole = engine.generate([asking(PROMPTS[1], **drawn)])[0].choice
    end = whole.token_ids[5]
    at = whole.token_ids.index(end)
    ended = engine.generate([asking(PROMPTS[1], stop_ids=(end,), **drawn)])[0].choice
    assert ended.finish_reason == "stop" and ended.token_ids == whole.token_ids[: at + 1]
    piece = next(character for character in whole.text[2:] if character.strip() and character != "\ufffd")
    cut = engine.generate([asking(PROMPTS[1], stop=(piece,), **drawn)])[0].choice
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(piece)]


def test_draws_depend_on_the_seed_alone(engine: EncoderDecoderEngine) -> None:
    asked = asking(PROMPTS[3], 8, temperature=1.0, seed=11, n=3, top_k=50)
    alone = engine.generate([asked])[0]
    crowd = engine.generate([asking(PROMPTS[1]), asked, asking(PROMPTS[0], temperature=1.0, seed=2)])[1]
    assert [choice.token_ids for choice in alone.choices] == [choice.token_ids for choice in crowd.choices]
    assert len({choice.token_ids for choice in alone.choices}) == 3


def test_draws_follow_the_models_distribution(engine: EncoderDecoderEngine, model: Any) -> None:
    """First tokens of 128 × 8 answers at top-k 2 against the model's own ratio (BART's first one is forced)."""
    forced = model.generation_config.forced_bos_token_id is not None
    read = [model.config.decoder_start_token_id, *([1] if forced else [])]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]]), decoder_input_ids=torch.tensor([read])).logits[0, -1]
    heights, best = logits.topk(2)
    expected = float(heights.softmax(0)[0])
    asked = [asking(PROMPTS[0], len(read), temperature=1.0, top_k=2, n=128, seed=seed) for seed in range(8)]
    drawn = Counter(c.token_ids[-1] for result in engine.generate(asked) for c in result.choices)
    assert set(drawn) <= set(best.tolist())
    share = drawn[int(best[0])] / 1024
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 1024) + 1e-9


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
def test_beams_are_those_of_generate(engine: EncoderDecoderEngine, model: Any, penalty: float) -> None:
    end = engine.generate([asking(PROMPTS[1])])[0].choice.token_ids[4]  # a token that comes, so that texts do end
    asked = [asking(prompt, 9, beams=3, length_penalty=penalty, stop_ids=(end,)) for prompt in PROMPTS]
    results = engine.generate([*asked[:2], asking(PROMPTS[4]), *asked[2:]])
    assert results.pop(2).choice.token_ids == greedy(model, PROMPTS[4], 16)  # beside them in a batch
    for request, result in zip(asked, results, strict=True):
        ids = model.generate(
            input_ids=torch.tensor([request.prompt_ids]), num_beams=3, do_sample=False, max_new_tokens=9,
            attention_mask=torch.ones(1, len(request.prompt_ids or ()), dtype=torch.long), eos_token_id=end,
            length_penalty=penalty, early_stopping=False,
        )  # fmt: skip
        assert result.choice.token_ids == tuple(ids[0, 1:].tolist())


def test_constraints_and_the_best_of_several(engine: EncoderDecoderEngine) -> None:
    for beams in (1, 2):  # a forced first token has no text
        ask = asking(PROMPTS[1], 12, temperature=1.0, constraint=Constraint("regex", "(yes|no) [0-9]{2}"), beams=beams)
        assert re.fullmatch("(yes|no) [0-9]{2}", engine.generate([ask])[0].text)
    several = asking(PROMPTS[3], 8, temperature=1.0, seed=5, n=6, logprobs=0)
    found = engine.generate([several])[0].choices
    best = max(found, key=lambda choice: sum(p.logprob for p in choice.logprobs) / len(choice.logprobs))
    ranked = engine.generate([replace(several, n=1, best_of=6)])[0].choice
    assert ranked.token_ids == best.token_ids


def test_logprobs_and_scores_are_those_of_one_forward_pass(engine: EncoderDecoderEngine, model: Any) -> None:
    answers = engine.generate([asking(prompt, 9, logprobs=3) for prompt in PROMPTS])
    scored = engine.score(PROMPTS, [answer.choice.token_ids for answer in answers])
    for prompt, answer, found in zip(PROMPTS, answers, scored, strict=True):
        ids = answer.choice.token_ids
        with torch.no_grad():
            read = torch.tensor([[model.config.decoder_start_token_id, *ids[:-1]]])
            logprobs = model(input_ids=torch.tensor([prompt]), decoder_input_ids=read).logits[0].log_softmax(-1)
        expected = logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
        assert [token.logprob for token in answer.choice.logprobs] == pytest.approx(expected, abs=2e-5)
        assert list(found.logprobs) == pytest.approx(expected, abs=2e-5)
        assert list(found.greedy) == [int(row.argmax()) == id for row, id in zip(logprobs, ids, strict=True)]
        for token, row in zip(answer.choice.logprobs, logprobs, strict=True):
            assert [id for id, _ in token.top] == row.topk(3).indices.tolist()


def test_streams_are_the_answers_in_pieces(engine: EncoderDecoderEngine) -> None:
    asked = asking(PROMPTS[1], 20)
    whole = engine.generate([asked])[0].choice
    deltas = list(engine.stream(asked))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert tuple(id for delta in deltas for id in delta.token_ids) == whole.token_ids
    assert [delta.finish_reason for delta in deltas][-1] == "length" and len(deltas) == 20


def test_cancelling_one_leaves_the_others(engine: EncoderDecoderEngine, model: Any) -> None:
    heard: list[Delta | FledgeError] = []
    other: list[Delta | FledgeError] = []

    def listen(delta: Delta | FledgeError) -> None:
        heard.append(delta)
        if len(heard) == 3:
            handle.cancel()

    def listen_too(delta: Delta | FledgeError) -> None:
        other.append(delta)
        if len(other) == 30:
            done.set()

    done = threading.Event()
    handle = engine._ticket(asking(PROMPTS[0], 60), listen)
    engine._post([handle, engine._ticket(asking(PROMPTS[3], 30), listen_too)])
    assert done.wait(30)
    assert isinstance(heard[-1], Delta) and heard[-1].finish_reason == "cancelled" and len(heard) <= 5
    told = tuple(id for delta in other if isinstance(delta, Delta) for id in delta.token_ids)
    assert told == greedy(model, PROMPTS[3], 30)


def test_chats_and_text(engine: EncoderDecoderEngine, model: Any) -> None:
    prompt = tuple(engine.renderer.render((Message("user", "你好"),), add_generation_prompt=True).ids)  # type: ignore[union-attr]
    chat = Request(messages=(Message("user", "你好"),), temperature=0, max_new_tokens=6, stop_ids=())
    text = Request(text="Hello", temperature=0, max_new_tokens=6, stop_ids=())
    found = engine.generate([chat, text])
    assert found[0].choice.token_ids == greedy(model, prompt, 6)
    assert found[1].choice.token_ids == greedy(model, tuple(engine.encode("Hello")), 6)
    assert engine.count(chat) == len(prompt)
    assert engine.decode(engine.encode("你好<|im_end|>")) == "你好<|im_end|>"


def test_vectors_are_the_encoders_mean(engine: EncoderDecoderEngine, model: Any) -> None:
    texts = ["Hello", "你好，世界", "a"]
    for text, vector in zip(texts, engine.embed(texts), strict=True):
        with torch.no_grad():
            hidden = model.get_encoder()(torch.tensor([engine.encode(text)])).last_hidden_state[0]
        assert vector == pytest.approx(hidden.mean(0).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (asking((5,), adapter="law"), "adapter"),
        (asking((5,), prompt_logprobs=1), "prompt_logprobs"),
        (asking(()), "empty"),
        (asking((330,)), "outside the vocabulary"),
    ],
)
def test_what_cannot_be_is_its_own_requests_error(
    engine: EncoderDecoderEngine, model: Any, request_: Request, said: str
) -> None:
    results = engine.generate([request_, asking(PROMPTS[0], 4)])
    assert said in str(results[0].error)
    assert results[1].choice.token_ids == greedy(model, PROMPTS[0], 4)


def test_the_context_bounds_prompts_and_answers(engine: EncoderDecoderEngine) -> None:
    assert engine.context == 64
    assert isinstance(engine.generate([asking((5,) * 65)])[0].error, PromptTooLong)
    assert len(engine.generate([asking((5,) * 64, None)])[0].choice.token_ids) == 63  # type: ignore[arg-type]
    with pytest.raises(FledgeError, match=r"item 1(.|\n)*65 tokens"):
        engine.score([[5], [5] * 65], [[6], [6]])
    with pytest.raises(FledgeError, match="not a reward model"):
        engine.reward([Conversation((Message("user", "x"), Message("assistant", "y")))])


def test_weights_without_numbers_fail_their_requests() -> None:
    broken = t5()
    with torch.no_grad():
        broken.decoder.final_layer_norm.weight[3] = float("nan")
    with EncoderDecoderEngine(broken, tiny.tokenizer()) as engine:
        assert "no numbers" in str(engine.generate([asking(PROMPTS[0])])[0].error)
        assert "no numbers" in str(engine.generate([asking(PROMPTS[1])])[0].error)  # and the engine lives


def test_closing_ends_what_is_on_its_way() -> None:
    engine = EncoderDecoderEngine(bart(), tiny.tokenizer(), max_rows=1)
    heard: list[list[Any]] = [[], []]
    for place in (0, 1):
        engine.submit(asking(PROMPTS[place], 60), heard[place].append)
    engine.close()
    assert all(deltas[-1].finish_reason in ("cancelled", "length") for deltas in heard)
    assert heard[1][-1].finish_reason == "cancelled"
    with pytest.raises(FledgeError, match="closed"):
        engine.generate([asking(PROMPTS[0])])


def test_a_folder_is_opened_by_what_it_holds(tmp_path: Path) -> None:
    model = t5()
    folder = tiny.save(tmp_path / "t5", model)
    with open_engine(folder, device="cpu") as engine:
        assert isinstance(engine, EncoderDecoderEngine)
        assert engine.generate([asking(PROMPTS[1])])[0].choice.token_ids == greedy(model, PROMPTS[1], 16)
    with pytest.raises(FledgeError, match="decoder-only"):
        open_engine(folder, device="cpu", adapters={"a": folder})
