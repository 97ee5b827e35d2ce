"""Whatever a model would rather say, its answer is what the constraint demands."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from fledge.core.errors import FledgeError
from fledge.inference.constraint import Constraints
from fledge.inference.engine import Constraint, Request
from fledge.inference.sampling import Sampling, choose

STOPS = frozenset({0, 2})


@pytest.fixture(scope="module")
def constraints(tokenizer: Any) -> Constraints:
    return Constraints(tokenizer.backend_tokenizer.to_str())


def write(constraints: Constraints, constraint: Constraint, seed: int, limit: int = 3000, **options: Any) -> list[int]:
    """The tokens of an answer by a model that knows nothing: its logits are noise."""
    guide = constraints.guide(constraint, STOPS)
    state = Sampling.of(Request(text="x", seed=seed, **options), [], 0, guide)
    noise, ids = np.random.default_rng(seed), []
    while len(ids) < limit:
        ids.append(choose(noise.normal(0, 2, 330).astype(np.float32), state))
        state.took(ids[-1])
        if ids[-1] in STOPS or guide.complete:
            return ids
    raise AssertionError("the answer did not end")


def schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A small JSON Schema whose answers are bounded."""
    kinds = ["integer", "number", "boolean", "null", "string", "enum", "const", "pattern"]
    kind = rng.choice([*kinds, *(["object", "array", "anyOf"] * 2 if depth else [])])
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "exclusiveMaximum": 10}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "string":
        least = rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "绿色", 3, None, True, "naïve", "👩‍👩‍👧"], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["合同", 7, False, "a b"])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-z]{2,4}$", "^\\d{3}-\\d{4}$", "^[甲乙丙丁]{1,3}$"])}
    if kind == "anyOf":
        return {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    if kind == "array":
        least = rng.randint(0, 2)
        return {
            "type": "array", "items": schema(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 2)
        }  # fmt: skip
    names = rng.sample(["name", "年龄", "a-b", "x y", "items"], rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: schema(rng, depth - 1) for name in names},
        "required": names[: rng.randint(0, len(names))],
        "additionalProperties": False,
    }


def test_answers_of_200_schemas_parse_and_validate(constraints: Constraints, tokenizer: Any) -> None:
    kinds = set()
    for seed in range(200):
        wanted = schema(random.Random(seed))
        options = {"temperature": 0} if seed % 4 == 0 else {"temperature": 1.0, "top_k": seed % 3 * 20}
        ids = write(constraints, Constraint("json_schema", json.dumps(wanted)), seed, **options)
        text = tokenizer.backend_tokenizer.decode([id for id in ids if id not in STOPS])
        value = json.loads(text)
        jsonschema.validate(value, wanted)
        kinds.add(type(value))
    assert {dict, list, str, int, float, bool} <= kinds


def test_any_json(constraints: Constraints, tokenizer: Any) -> None:
    for seed in range(10):
        guide = constraints.guide(Constraint("json"), STOPS)
        for id in tokenizer.encode(
            json.dumps({"a": [1, 2.5, "好", None, {"b": True}][: seed % 6]}, indent=seed % 3, ensure_ascii=False)
        ):
            row = np.zeros(330, np.float32)
            guide.mask(row)
            assert row[id] == 0
            guide.took(id)
        assert guide.accepting


def test_white_space_comes_to_an_end(constraints: Constraints, tokenizer: Any) -> None:
    """A model that likes nothing better than spaces gets no further than an indented line of them."""
    guide = constraints.guide(Constraint("json_schema", '{"type": "array", "items": {"type": "null"}}'), STOPS)
    space = tokenizer.encode(" ")[0]
    guide.took(tokenizer.encode("[")[0])
    for _ in range(40):
        row = np.zeros(330, np.float32)
        guide.mask(row)
        if row[space]:
            return
        guide.took(space)
    raise AssertionError("it wrote white space for ever")


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{4}-[0-9]{2}", r"(yes|no|也许)", r"第[一二三四五六七八九十]{1,3}条", r"[😀-😎]{2}"]
)
def test_regular_expressions(constraints: Constraints, tokenizer: Any, pattern: str) -> None:
    """Every character of the Chinese ones is three tokens of this tokenizer, every emoji four."""
    texts = set()
    for seed in range(20):
        text = tokenizer.backend_tokenizer.decode(write(constraints, Constraint("regex", pattern), seed))
        assert re.fullmatch(pattern, text), text
        texts.add(text)
    assert len(texts) > 1


GRAMMAR = """
start: term (("+" | "-") term)*
term: NUMBER | "(" start ")"
NUMBER: /[0-9]{1,2}/
"""


def test_a_grammar_may_end_at_several_places(constraints: Constraints, tokenizer: Any) -> None:
    endings = set()
    for seed in range(30):
        ids = write(constraints, Constraint("grammar", GRAMMAR), seed, logit_bias={0: 3.0, 2: 3.0})
        text = tokenizer.backend_tokenizer.decode(ids)
        assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)
        endings.add(ids[-1])
    assert endings == STOPS


def test_without_stop_tokens_an_answer_ends_where_nothing_may_follow(constraints: Constraints, tokenizer: Any) -> None:
    guide = constraints.guide(Constraint("regex", "ab?"), frozenset())
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    guide.took(a)
    assert guide.accepting and not guide.complete
    row = np.zeros(330, np.float32)
    guide.mask(row)
    assert np.flatnonzero(np.isfinite(row)).tolist() == [b]
    guide.took(b)
    assert guide.complete


def test_stop_tokens_wait_for_the_end(constraints: Constraints, tokenizer: Any) -> None:
    guide = constraints.guide(Constraint("regex", "ab+"), STOPS)
    for letter, allowed in (("a", False), ("b", False), ("b", True)):
        row = np.zeros(332, np.float32)  # more columns than tokens, as padded embeddings have
        guide.mask(row)
        assert all(np.isfinite(row[stop]) == allowed for stop in STOPS) and not np.isfinite(row[330:]).any()
        guide.took(tokenizer.encode(letter)[0])


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("json_schema", '{"type": '), "line 1, column"),
        (Constraint("json_schema", '{"type": "strang"}'), "strang"),
        (Constraint("json_schema", "[1]"), "list"),
        (Constraint("json_schema", '{"properties": {"a": {"$ref": "#/$defs/missing"}}}'), "missing"),
        (Constraint("regex", "a(b"), "regular expression"),
        (Constraint("grammar", "start: a\nb: \"x\"\n"), "unknown"),
        (Constraint("grammar", 'start: "x" )\n'), "1"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(constraints: Constraints, constraint: Constraint, message: str) -> None:
    with pytest.raises(FledgeError, match=re.escape(message)) as caught:
        constraints.guide(constraint, STOPS)
    assert caught.value.problems[0].where == "constraint"


def test_a_dead_end_is_an_error_and_not_an_answer(constraints: Constraints, tokenizer: Any) -> None:
    guide = constraints.guide(Constraint("regex", "ab"), STOPS)
    guide.took(tokenizer.encode("x")[0])
    assert not guide.accepting and not guide.complete and guide.forced() == [] and guide.valid([5]) == 0
    with pytest.raises(FledgeError, match="satisfy") as caught:
        guide.mask(np.zeros(330, np.float32))
    assert "Tokens:" not in str(caught.value)


def test_a_constraint_is_compiled_once(constraints: Constraints, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Constraint] = []
    compile_ = constraints._compile
    monkeypatch.setattr(constraints, "_compile", lambda c: (compiled.append(c), compile_(c))[1])
    for n in [*range(70), 69, 68, 0]:
        constraints.guide(Constraint("regex", f"a{{{n + 1}}}"), STOPS)
    assert len(compiled) == 71, "68 and 69 are remembered, 0 was the oldest"


def test_guides_of_one_constraint_do_not_disturb_each_other(constraints: Constraints, tokenizer: Any) -> None:
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    first = constraints.guide(Constraint("regex", "aab"), STOPS)
    first.took(a)
    fork, second = first.fork(), constraints.guide(Constraint("regex", "aab"), STOPS)
    first.took(a)
    assert (first.valid([b]), fork.valid([b]), fork.valid([a, b, a]), second.valid([a, a, b])) == (1, 0, 2, 3)


def test_what_must_follow_is_known(constraints: Constraints, tokenizer: Any) -> None:
    wanted = {"type": "object", "properties": {"name": {"type": "boolean"}}, "required": ["name"]}
    guide = constraints.guide(Constraint("json_schema", json.dumps(wanted)), STOPS)
    guide.took(tokenizer.encode("{")[0])
    guide.took(tokenizer.encode('"')[0])
    assert tokenizer.backend_tokenizer.decode(guide.forced()).startswith("name")


def test_byte_fallback(tokenizer: Any) -> None:
    """A tokenizer in LLaMA's manner: what it has no piece for it spells in bytes."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{n:02X}>", -9.0) for n in range(256))]
    pieces += [("▁", -2.0), *((letter, -3.0) for letter in 'abc{}":,[]0123')]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    constraints = Constraints(backend.to_str())
    guide = constraints.guide(Constraint("regex", "[好坏]{2}[ab]"), frozenset({2}))
    state = Sampling.of(Request(text="x", seed=1), [], 0, guide)
    ids: list[int] = []
    while not guide.complete:
        ids.append(choose(np.zeros(len(pieces), np.float32), state))
        state.took(ids[-1])
    assert re.fullmatch("[好坏]{2}[ab]", backend.decode(ids)) and len(ids) == 7


def test_a_tokenizer_of_words_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(FledgeError, match="tokenizer"):
        Constraints(backend.to_str())
