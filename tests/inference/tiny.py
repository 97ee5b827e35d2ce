"""Small models made in a moment: a random one, and one that has learned a few answers by heart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fledge.records.chat import ChatRenderer, default_template
from fledge.records.kinds import Message

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TAUGHT = {
    "Hello": "Hello! How can I help you today?",
    "你好": "你好！很高兴见到你，有什么可以帮你？",
    "markup": "<script>window.pwned = 1</script> and <img src=x onerror='window.pwned = 2'> are **text**.",
    "long": " ".join(["one two three four five six seven eight nine ten"] * 5),
}


def tokenizer() -> Any:
    """A byte-level tokenizer that knows its control tokens and few merges: Chinese takes three tokens a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user\nassistant\nsystem\n hello how can I help you today the and"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:3]})
    made.chat_template = default_template()
    return made


def llama(seed: int = 0, **shape: Any) -> LlamaForCausalLM:
    """A random Llama (GQA) whose logits are far enough apart that rounding does not decide."""
    torch.manual_seed(seed)
    options = dict(
        vocab_size=330, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=3,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(options | shape))).eval()


def save(folder: Path, model: Any) -> Path:
    """A model folder as fledge writes them. The model stays as it is: saving names the ends of a turn in its config."""
    from fledge.models.save import save_model

    save_model(copy.deepcopy(model), tokenizer(), folder)
    return folder


def taught() -> LlamaForCausalLM:
    """A model that has learned the answers of `TAUGHT` by heart (a few seconds)."""
    model = llama(initializer_range=0.05, max_position_embeddings=1024, tie_word_embeddings=True)
    renderer = ChatRenderer(tokenizer())
    rows = [renderer.render((Message("user", ask), Message("assistant", answer))) for ask, answer in TAUGHT.items()]
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [3] * (width - len(row.ids)) for row in rows])
    weights = torch.tensor([row.weights + [0.0] * (width - len(row.weights)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=300)
    for _ in range(300):
        logits = model(ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if loss.item() < 5e-3:
            break
    return model.eval()
