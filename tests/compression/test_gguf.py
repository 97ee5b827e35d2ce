"""The GGUF file, read back by transformers and by the gguf package: weights, tokenizer, template, answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fledge.compression.agree import agreement
from fledge.compression.gguf import describe, interleave
from fledge.compression.gguf_tokenizer import pre_tokenizer_name, read_vocabulary
from fledge.compression.stages import Export, Quantize
from fledge.core.artifact import GGUF, Model, sha256_of
from fledge.core.errors import FledgeError
from fledge.data.tokens.tokenizer import PATTERN
from fledge.models.importing import load_gguf
from fledge.models.load import load_model, load_tokenizer
from fledge.models.save import save_model
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Message

Run = Callable[..., Any]
TEXTS = (
    "Hello, world!  It's 2026 — and the price rose by 12.5% (again)…\n\n\tdef f(x):\n        return x",
    "你好，世界！今天是二〇二六年，价格上涨了百分之十二点五。",
    "Mixed 中英文 text with emoji 🙂👩‍👩‍👧‍👦🇨🇳 and accents: naïve café, Ünïcödé",
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n",
    " leading and trailing  ",
)
CHAT = (Message("system", "Be brief. 请简短。"), Message("user", "What does 画蛇添足 mean?"))


def only_file(made: GGUF) -> Path:
    (file,) = made.path.iterdir()
    return file


def field(file: Path, key: str) -> Any:
    found = gguf.GGUFReader(file).get_field(key)
    return None if found is None else found.contents()


@pytest.mark.parametrize("shape", ["tied", "untied"])
def test_f32_is_the_model_itself(shape: str, run: Run, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(shape)
    file = only_file(run(Export(model="base", quantization="f32"), model=Model(source)))
    ids = torch.arange(4, 100)[None]
    with torch.no_grad():
        ours, theirs = load_model(source)(ids).logits, load_gguf(file)[0](ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert ("output.weight" in describe(file)) == (shape == "untied")


def test_every_token_id_comes_back(tied: Path, run: Run) -> None:
    file = only_file(run(Export(model="base", quantization="q8_0"), model=Model(tied)))
    ours, theirs = load_tokenizer(tied), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    control = ours.convert_tokens_to_ids("<|im_start|>")
    assert ours(TEXTS[3])["input_ids"].count(control) == 2
    assert (theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<|pad|>")


def test_a_chat_renders_alike_and_is_answered_alike(tied: Path, run: Run) -> None:
    files = [only_file(run(Export(model="base", quantization=q), model=Model(tied))) for q in ("f32", "q8_0")]
    renderer, theirs = ChatRenderer(load_tokenizer(tied)), ChatRenderer(load_gguf(files[0])[1])
    chat = [*CHAT, Message("assistant", "  多此一举。 ")]
    assert theirs.render(CHAT, add_generation_prompt=True).ids == renderer.render(CHAT, add_generation_prompt=True).ids
    assert theirs.render(chat).ids == renderer.render(chat).ids
    small = run(Quantize(model="base"), model=Model(tied)).path
    original, same, *others = agreement([tied, files[0], small, files[1]], CHAT, max_new_tokens=12)
    assert same.same and same.first_kl < 1e-6 and len(original.token_ids) == 12
    assert all(0 < copy.first_kl < 0.02 for copy in others)


def test_the_header_says_what_llama_cpp_needs(tied: Path, run: Run) -> None:
    file = only_file(run(Export(model="base", quantization="q8_0", name="tiny"), model=Model(tied)))
    assert file.name == "tiny-q8_0.gguf"
    size = len(load_tokenizer(tied)) + 3
    expected = {
        "general.architecture": "llama", "general.name": "tiny", "general.file_type": 7, "llama.context_length": 128,
        "llama.embedding_length": 64, "llama.block_count": 2, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": size, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.padding_token_id": 3, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: field(file, key) for key in expected} == expected
    types, tokens = field(file, "tokenizer.ggml.token_type"), field(file, "tokenizer.ggml.tokens")
    assert len(tokens) == len(types) == len(set(tokens)) == size
    assert types[:5] == [3, 3, 3, 3, 1] and types[-3:] == [5, 5, 5]


def test_q8_0_is_rounded_in_blocks_of_32(tied: Path, run: Run) -> None:
    file = only_file(run(Export(model="base", quantization="q8_0"), model=Model(tied)))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weight = load_model(tied).get_submodule("model.layers.1.mlp.up_proj").weight.detach().numpy()
    blocks = weight.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    stored = tensors["blk.1.ffn_up.weight"].data.reshape(-1, 34)  # two bytes of scale, 32 of numbers
    np.testing.assert_array_equal(stored[:, :2].copy().view(np.float16), scale)
    error = np.abs(stored[:, 2:].view(np.int8) * scale.astype(np.float32) - blocks)
    assert (error <= 0.51 * np.abs(blocks).max(1, keepdims=True) / 127 + np.abs(blocks) * 2**-10).all()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_below_eight_bits_the_embedding_stays_in_eight(tied: Path, run: Run) -> None:
    made = run(Export(model="base", quantization="q4_0", max_kl=9.0), model=Model(tied))
    kinds = describe(only_file(made))
    assert (kinds["token_embd.weight"], kinds["blk.0.attn_q.weight"]) == ("Q8_0", "Q4_0")
    with pytest.raises(FledgeError, match="loses too much of the model"):
        run(Export(model="base", quantization="q4_0", max_kl=1e-6), model=Model(tied))


def test_interleave_is_what_rotation_of_neighbours_needs() -> None:
    rows = np.arange(16, dtype=np.float32)[:, None].repeat(3, axis=1)  # two heads of eight channels
    assert interleave(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_the_same_bytes_every_time(tied: Path, run: Run) -> None:
    one, two = (only_file(run(Export(model="base"), model=Model(tied))) for _ in range(2))
    assert sha256_of(one) == sha256_of(two)


def test_the_template_keeps_its_words_but_not_its_generation_tags(tied: Path, run: Run) -> None:
    template = field(only_file(run(Export(model="base"), model=Model(tied))), "tokenizer.chat_template")
    assert "{%- generation" not in template and "{#- generation #}" in template and "{#- endgeneration #}" in template


def test_pre_tokenizers_get_the_name_their_readers_know() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    gpt2 = {"normalizer": None, "pre_tokenizer": byte_level, "model": {"type": "BPE", "ignore_merges": False}}
    smollm = gpt2 | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    ours = gpt2 | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}}
    assert [pre_tokenizer_name(saved) for saved in (gpt2, smollm, ours)] == ["gpt-2", "smollm", "qwen2"]
    for changed in (
        gpt2 | {"normalizer": {"type": "Lowercase"}},
        gpt2 | {"pre_tokenizer": {"type": "Whitespace"}},
        gpt2 | {"pre_tokenizer": gpt2["pre_tokenizer"] | {"add_prefix_space": True}},
        gpt2 | {"model": gpt2["model"] | {"ignore_merges": True}},
        ours | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}},
    ):
        with pytest.raises(FledgeError, match="cannot be written as GGUF"):
            pre_tokenizer_name(changed)


def test_what_gguf_cannot_hold_is_refused(tied: Path, run: Run, tmp_path: Path) -> None:
    model, tokenizer = load_model(tied), load_tokenizer(tied)
    save_model(model, tokenizer, tmp_path / "scaled")
    config = json.loads((tmp_path / "scaled" / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FledgeError, match="rope_type: linear"):
        run(Export(model="base"), model=Model(tmp_path / "scaled"))
    with pytest.raises(FledgeError, match="tokens that the model has not"):
        read_vocabulary(tied, tokenizer, size=300)


@pytest.mark.nightly
def test_llama_cpp_answers_alike(tied: Path, run: Run) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it builds for ten minutes)")
    file = only_file(run(Export(model="base", quantization="f32"), model=Model(tied)))
    tokenizer, model = load_tokenizer(tied), load_model(tied)
    theirs = llama_cpp.Llama(str(file), n_ctx=128, logits_all=True, verbose=False)
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text)["input_ids"], text
    prompt = ChatRenderer(tokenizer).render(CHAT, add_generation_prompt=True).ids
    theirs.eval(prompt)
    with torch.no_grad():
        ours = model(torch.tensor([prompt])).logits[0].numpy()
    np.testing.assert_allclose(np.array(theirs.scores[: len(prompt)]), ours, atol=0.05)
