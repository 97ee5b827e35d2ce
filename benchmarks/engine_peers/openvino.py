"""OpenVINO GenAI's ContinuousBatchingPipeline. optimum-intel converts the model, in an environment of its own.

fp32 and bf16 compute and cache in that precision. int8 stands for 8-bit weights; what the activations and the cache
are is then left to OpenVINO (bf16, and 8-bit keys and values).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import material
import peers

from engine_peers import side

PRECISIONS = ("fp32", "bf16", "int8")
REQUIREMENTS = ("openvino-genai>=2026.4",)
CONVERTER = ("torch==2.13.0", "optimum-intel[openvino]>=2.2", "openvino-tokenizers>=2026.4")
PROPERTIES = {
    "fp32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
    "int8": {"INFERENCE_PRECISION_HINT": "bf16"},
}


def python() -> Path:
    return peers.environment("openvino", *REQUIREMENTS)


def model(precision: str) -> Path:
    weights = "int8" if precision == "int8" else "fp32"
    folder = peers.HOME / "engine" / f"openvino-{weights}"
    if not (folder / "openvino_tokenizer.xml").exists():
        converter = peers.environment("openvino-converter", *CONVERTER, without=["torchvision"])
        program = "from optimum.commands.optimum_cli import main; main()"
        command = [
            converter, "-c", program, "export", "openvino", "--model", material.smollm2() / "base",
            "--task", "text-generation-with-past", "--weight-format", weights, folder,
        ]  # fmt: skip
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr, env=offline)
    return folder


def variables() -> dict[str, str]:
    return {}


def load(args: argparse.Namespace) -> side.Generate:
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 512
    scheduler.cache_size = 1  # GB: all 64 requests fit in fp32
    scheduler.enable_prefix_caching = False
    scheduler.dynamic_split_fuse = True
    properties = {**PROPERTIES[args.precision], "INFERENCE_NUM_THREADS": side.CORES}
    pipeline = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties)

    def settings(length: int) -> genai.GenerationConfig:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
        config.apply_chat_template = False
        return config

    def generate(prompts: list[side.Prompt], lengths: list[int]) -> list[list[int]]:
        tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [settings(length) for length in lengths])
        return [result.m_generation_ids[0] for result in results]

    return generate


if __name__ == "__main__":
    side.run(load)
