"""Constraints, guesses, `best_of` and beams in the engine: alone, in a batch, cut short, put back."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from fledge.core.errors import FledgeError
from fledge.inference.engine import Constraint, Request
from fledge.inference.native import NativeEngine
from fledge.inference.scheduler import Statistics
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Message
from tests.inference import tiny

SCHEMA = {
    "type": "object",
    "properties": {
        "名字": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["合同", "report", "信"]},
        "pages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["名字", "kind", "pages"],
    "additionalProperties": False,
}
WANTED = Constraint("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def drafted(model: Any, tokenizer: Any) -> Iterator[NativeEngine]:
    """Guesses with a model that is often, not always, right."""
    small = tiny.llama()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    with NativeEngine(tiny.llama(), tokenizer, draft=small) as engine:
        yield engine


@pytest.fixture(scope="module")
def looping() -> Any:
    """A model whose every sixth token leads back: what it writes repeats itself, more or less."""
    model = tiny.llama(4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.mul_(0.02)
        following = [token - 5 if token % 6 == 5 else token + 1 for token in range(330)]
        model.lm_head.weight[following] = model.model.embed_tokens.weight * 1.5
    return model


def settled(engine: NativeEngine) -> Statistics:
    """The statistics between two steps."""
    return engine._call(engine.statistics)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts that repeat themselves, so that there is something to guess from."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        phrase = [rng.randrange(4, 330) for _ in range(rng.randint(2, 6))]
        made.append(phrase * 3 + [rng.randrange(4, 330) for _ in range(rng.randint(0, 3))] + phrase[:2])
    return made


def request(prompt: list[int], **options: Any) -> Request:
    return Request(prompt_ids=tuple(prompt), **({"max_new_tokens": 30, "temperature": 0, "stop_ids": ()} | options))


def tokens(engine: NativeEngine, requests: list[Request]) -> list[list[tuple[int, ...]]]:
    return [[choice.token_ids for choice in result.choices] for result in engine.generate(requests)]


def greedy(model: Any, prompt: list[int], count: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    options = dict(do_sample=False, max_new_tokens=count, pad_token_id=3, eos_token_id=None)
    return tuple(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())


# ---- constraints


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3}, {"seed": 4, "speculate": False}])
def test_answers_keep_to_their_schema(engine: NativeEngine, options: dict[str, Any]) -> None:
    asked = [
        request([5, 6, n], constraint=WANTED, n=2, **(options | {"max_new_tokens": 240, "stop_ids": None}))
        for n in range(4, 8)
    ]
    for result in engine.generate([*asked, request([9] * 30)])[:-1]:
        for choice in result.choices:
            jsonschema.validate(json.loads(choice.text), SCHEMA)
            assert choice.finish_reason == "stop"


def test_a_constraint_leaves_its_neighbours_alone(engine: NativeEngine, model: Any) -> None:
    free = prompts(4)
    requests = [request(prompt) for prompt in free]
    constrained = request([7, 8], constraint=Constraint("regex", "[ab]{5}"), max_new_tokens=9)
    results = engine.generate([requests[0], constrained, *requests[1:], constrained])
    assert [results[n].choice.token_ids for n in (0, 2, 3, 4)] == [greedy(model, prompt, 30) for prompt in free]
    assert re.fullmatch("[ab]{5}", results[1].text) and results[1].text == results[5].text
    assert results[1].choice.finish_reason == "stop", "it ends where nothing may follow, without a stop token"


def test_an_answer_cut_short_says_so(engine: NativeEngine) -> None:
    choice = engine.generate([request([5], constraint=Constraint("regex", "[ab]{50}"), max_new_tokens=7)])[0].choice
    assert choice.finish_reason == "length" and re.fullmatch("[ab]+", choice.text)


def test_guessing_changes_no_constrained_answer(engine: NativeEngine) -> None:
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 5, "n": 3}):
        asked = dict(constraint=WANTED, max_new_tokens=240, stop_ids=None, **options)
        before = settled(engine).accepted_tokens
        guessed, plain = (tokens(engine, [request([5, 6, 7], speculate=on, **asked)]) for on in (True, False))
        assert guessed == plain
        assert settled(engine).accepted_tokens > before, "keys and punctuation should have been guessed"


def test_a_draft_model_keeps_to_the_grammar_too(drafted: NativeEngine, engine: NativeEngine) -> None:
    asked = request([5, 6, 7], constraint=WANTED, max_new_tokens=240, stop_ids=None)
    assert tokens(drafted, [asked]) == tokens(engine, [replace(asked, speculate=False)])
    drawn = replace(asked, temperature=1.0, seed=2, n=2, best_of=4)
    result = drafted.generate([drawn])[0]
    for choice in result.choices:
        jsonschema.validate(json.loads(choice.text), SCHEMA)
    assert [choice.token_ids for choice in result.choices] == tokens(drafted, [asked, drawn])[1]


def test_a_chat_ends_where_the_grammar_does(tokenizer: Any) -> None:
    with NativeEngine(tiny.llama(3), tokenizer, ChatRenderer(tokenizer)) as chatty:
        asked = Request(messages=(Message("user", "几点？"),), constraint=Constraint("regex", "[0-9]{1,2}点"), seed=1)
        result = chatty.generate([asked])[0]
    assert re.fullmatch("[0-9]{1,2}点", result.text) and result.choice.finish_reason == "stop"


def test_a_constraint_that_cannot_be_is_refused_alone(engine: NativeEngine, model: Any) -> None:
    results = engine.generate(
        [
            request([5, 6]),
            request([5, 6], constraint=Constraint("json_schema", '{"type": "strang"}')),
            request([5, 6], constraint=Constraint("regex", "a(")),
        ]
    )
    assert results[0].choice.token_ids == greedy(model, [5, 6], 30)
    assert all(result.error is not None and result.error.problems[0].where == "constraint" for result in results[1:])
    with pytest.raises(FledgeError, match="strang"):
        engine.submit(request([5], constraint=Constraint("json_schema", '{"type": "strang"}')), lambda delta: None)


# ---- guesses


def test_prompt_lookup_changes_no_token(looping: Any, tokenizer: Any) -> None:
    work = prompts(12)
    expected = [[greedy(looping, prompt, 30)] for prompt in work]
    with NativeEngine(looping, tokenizer) as engine:
        assert [tokens(engine, [request(prompt)])[0] for prompt in work] == expected
        found = settled(engine)
        assert found.draft_tokens >= found.accepted_tokens > 100
        assert tokens(engine, [request(prompt) for prompt in work]) == expected, "together as alone"
    with NativeEngine(looping, tokenizer, lookup=False) as engine:
        assert tokens(engine, [request(prompt) for prompt in work]) == expected
        assert settled(engine).draft_tokens == 0


def test_seeded_answers_are_the_same_with_and_without_lookup(looping: Any, tokenizer: Any) -> None:
    with NativeEngine(looping, tokenizer) as engine:
        for options in ({}, {"top_p": 0.8, "frequency_penalty": 0.2}, {"repetition_penalty": 1.1, "n": 2}):
            asked = [request(prompt, temperature=0.5, seed=n, **options) for n, prompt in enumerate(prompts(6))]
            before = settled(engine).accepted_tokens
            guessed = tokens(engine, asked)
            assert settled(engine).accepted_tokens > before
            assert guessed == tokens(engine, [replace(one, speculate=False) for one in asked])


def test_stops_inside_a_guess(looping: Any, tokenizer: Any) -> None:
    """A stop token, a stop string or the last token may be one of several that come together."""
    with NativeEngine(looping, tokenizer) as engine:
        for prompt in prompts(2, seed=2):
            whole = greedy(looping, prompt, 30)
            for at in range(1, 30, 6):
                asked = [request(prompt, stop_ids=(whole[at],)), request(prompt, max_new_tokens=at)]
                expected = [whole[: whole.index(whole[at]) + 1], whole[:at]]
                assert [tokens(engine, [one])[0][0] for one in asked] == expected
        text = engine.generate([request(prompt)])[0].text
        found = engine.generate([request(prompt, stop=(text[9:11],))])[0].choice
        assert found.text == text[: text.index(text[9:11])] and found.finish_reason == "stop"
        assert settled(engine).accepted_tokens > 40


def test_a_draft_model_changes_no_greedy_token(drafted: NativeEngine, model: Any) -> None:
    work = prompts(10, seed=3)
    expected = [[greedy(model, prompt, 30)] for prompt in work]
    before = settled(drafted)
    assert [tokens(drafted, [request(prompt)])[0] for prompt in work] == expected
    after = settled(drafted)
    proposed, kept = after.draft_tokens - before.draft_tokens, after.accepted_tokens - before.accepted_tokens
    assert 0.1 * proposed < kept < proposed, "the draft should be right sometimes"
    assert tokens(drafted, [request(prompt) for prompt in work]) == expected, "together as alone"


def test_a_draft_model_gives_the_same_answer_for_a_seed(drafted: NativeEngine) -> None:
    asked = [request(prompt, temperature=0.8, seed=n) for n, prompt in enumerate(prompts(6, seed=4))]
    alone = [tokens(drafted, [one])[0] for one in asked]
    assert tokens(drafted, asked) == alone == tokens(drafted, asked)
    plain = tokens(drafted, [replace(one, speculate=False) for one in asked])
    assert plain != alone, "other draws of the same distribution"


def test_a_drafted_answer_has_the_models_distribution(drafted: NativeEngine, model: Any) -> None:
    """The three tokens of 1,000 seeded answers against the exact distribution of a cut-down vocabulary."""
    prompt, count = [5, 6, 7], 1000
    options = dict(temperature=1.5, top_k=3, max_new_tokens=3)
    expected: dict[tuple[int, ...], float] = {}

    def following(ids: list[int]) -> dict[int, float]:
        with torch.inference_mode():
            row = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double() / 1.5
        top = row.topk(3)
        return dict(zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True))

    for a, p in following(prompt).items():
        for b, q in following([*prompt, a]).items():
            for c, r in following([*prompt, a, b]).items():
                expected[a, b, c] = p * q * r * count
    asked = [request(prompt, seed=seed, **options) for seed in range(count)]
    seen = [choice[0] for choice in tokens(drafted, asked)]
    cells = [(seen.count(text), times) for text, times in expected.items() if times >= 4]
    assert set(seen) <= set(expected) and sum(times for _, times in cells) > 0.9 * count
    chi2 = sum((observed - times) ** 2 / times for observed, times in cells)
    assert chi2 < len(cells) + 4 * (2 * len(cells)) ** 0.5


def test_guesses_survive_being_put_back(tokenizer: Any, model: Any) -> None:
    work = prompts(10, seed=5)
    small = tiny.llama()
    with NativeEngine(tiny.llama(), tokenizer, draft=small, cache_bytes=300_000) as engine:
        found = tokens(engine, [request(prompt, max_new_tokens=120) for prompt in work])
        assert engine.statistics().preemptions > 0, "the budget should have been too small"
        assert settled(engine).blocks_used == 0
    assert found == [[greedy(model, prompt, 120)] for prompt in work]


def test_a_draft_of_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(FledgeError, match="vocabulary"):
        NativeEngine(tiny.llama(), tokenizer, draft=tiny.llama(vocab_size=200))
    folder, other = (tiny.save(tmp_path / name, tiny.llama()) for name in ("model", "other"))
    with NativeEngine.from_folder(folder, dtype="float32", device="cpu", draft=other) as engine:
        assert tokens(engine, [request([5, 6], max_new_tokens=9)]) == [[greedy(tiny.llama(), [5, 6], 9)]]
        assert settled(engine).accepted_tokens == settled(engine).draft_tokens > 0, "it is the same model"
        assert engine._call(lambda: engine._guessing._drafted) == [], "what has ended is forgotten"
    written = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words = written["model"]["vocab"]
    words["h"], words["e"] = words["e"], words["h"]
    (other / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(FledgeError, match="vocabulary"):
        NativeEngine.from_folder(folder, dtype="float32", device="cpu", draft=other)


# ---- the likeliest of several


def test_best_of_returns_the_likeliest(engine: NativeEngine) -> None:
    shared = dict(temperature=1.0, seed=9, max_new_tokens=10)
    every = engine.generate([request([5, 6, 7], n=8, logprobs=0, **shared)])[0].choices
    best = sorted(every, key=lambda c: -sum(p.logprob for p in c.logprobs) / len(c.logprobs))[:3]
    found = engine.generate([request([5, 6, 7], n=3, best_of=8, **shared)])[0].choices
    assert [c.token_ids for c in found] == [c.token_ids for c in best]
    assert all(c.logprobs == () for c in found)
    asked = request([5, 6, 7], n=3, best_of=8, logprobs=1, **shared)
    deltas = list(engine.stream(asked))
    assert sum(d.finish_reason is not None for d in deltas) == 3
    text = "".join(d.text for d in deltas if d.index == 0)
    assert text == best[0].text and all(d.logprobs for d in deltas if d.token_ids)


# ---- beams


def reference(model: Any, prompt: list[int], beams: int, n: int, stops: tuple[int, ...]) -> list[tuple[int, ...]]:
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=beams, num_return_sequences=n,
        early_stopping=False, max_new_tokens=20, eos_token_id=list(stops) or None, pad_token_id=3,
    )  # fmt: skip
    rows = [row[len(prompt) :] for row in found.tolist()]
    return [tuple(row[: next((n + 1 for n, x in enumerate(row) if x in stops), len(row))]) for row in rows]


@pytest.mark.parametrize("options", [{}, {"cache_bytes": 400_000}, {"prefill_tokens": 8}], ids=str)
def test_beams_equal_transformers_in_a_crowd(tokenizer: Any, model: Any, options: dict[str, Any]) -> None:
    stops = tuple(range(20, 50))
    work = [
        (prompt * 2, beams, n)
        for prompt, beams, n in zip(prompts(6, 6), (2, 4, 3, 4, 2, 5), (1, 4, 2, 1, 2, 3), strict=True)
    ]
    crowd = [request(prompt, max_new_tokens=60) for prompt in prompts(6, 7)]
    with NativeEngine(tiny.llama(), tokenizer, **options) as engine:
        searched = [request(p, beams=b, n=n, stop_ids=stops, max_new_tokens=20) for p, b, n in work]
        found = tokens(engine, [one for pair in zip(searched, crowd, strict=True) for one in pair])
        if "cache_bytes" in options:
            assert engine.statistics().preemptions > 0, "the budget should have been too small"
        assert settled(engine).blocks_used == 0
    assert found[::2] == [reference(model, *job, stops) for job in work]
    assert found[1::2] == [[greedy(model, list(one.prompt_ids or ()), 60)] for one in crowd]


def test_beams_with_a_schema_stop_strings_and_logprobs(engine: NativeEngine) -> None:
    shared = dict(beams=3, n=3, logprobs=1)
    result = engine.generate([request([5, 6], constraint=Constraint("regex", "(合同|信件|report)s?"), **shared)])[0]
    assert all(re.fullmatch("(合同|信件|report)s?", choice.text) for choice in result.choices)
    assert all([p.id for p in choice.logprobs] == list(choice.token_ids) for choice in result.choices)
    plain = engine.generate([request([5, 6], beams=3, max_new_tokens=12)])[0].choice
    stop = plain.text[2:4]
    cut = engine.generate([request([5, 6], beams=3, max_new_tokens=12, stop=(stop,))])[0].choice
    assert stop not in cut.text


def test_beams_that_could_never_fit_are_refused(tokenizer: Any) -> None:
    with (
        NativeEngine(tiny.llama(), tokenizer, cache_bytes=300_000) as engine,
        pytest.raises(FledgeError, match="beams"),
    ):
        engine.submit(request([5] * 20, beams=32, max_new_tokens=200), lambda delta: None)


def test_a_cancelled_search_ends_all_its_answers(engine: NativeEngine) -> None:
    stream = engine.stream(request([5], beams=4, n=4, max_new_tokens=200))
    engine.generate([request([6], max_new_tokens=2)])
    stream.close()
    assert len(engine.generate([request([5], max_new_tokens=2)])[0].choice.token_ids) == 2
