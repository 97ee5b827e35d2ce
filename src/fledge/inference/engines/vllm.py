"""vLLM in an environment of its own, over HTTP.

    engine = VLLM("model/", dtype="float32")

`python -m vllm.entrypoints.openai.api_server` is started on a free port of this machine and stopped with the engine.
It takes a minute or two on a CPU. Our own tokenizer reads and writes its token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge.inference.engines.environments import missing, python_of
from fledge.inference.engines.process import ServerProcess, Tell, free_port
from fledge.inference.engines.started import StartedEngine

_QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class VLLM(StartedEngine):
    """An `Engine` over a vLLM server of a model folder; an adapter's folder is served over its base."""

    def __init__(
        self,
        folder: Path | str,
        *,
        python: Path | str | None = None,
        dtype: str = "auto",
        context: int | None = None,
        adapters: Mapping[str, Path] | None = None,
        arguments: Sequence[str] = (),
        tell: Tell | None = None,
        **options: Any,
    ) -> None:
        """`python`: that of an environment with vLLM; `adapters`: LoRA folders by name; `arguments`: more of its flags;
        `options`: `RemoteEngine`'s.

        Raises FledgeError when vLLM is not there or does not start (with the end of its log)."""
        folder = Path(folder)
        found = python or python_of("vllm")
        if found is None:
            raise missing("vllm")
        port = free_port()
        command = [str(found), "-m", "vllm.entrypoints.openai.api_server", *_of_model(folder, adapters or {})]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-logprobs", "20"]
        command += ["--generation-config", "vllm"]  # its own defaults are neutral, the folder's may not be
        command += ["--max-model-len", str(context)] if context else []
        process = ServerProcess("vllm", [*command, *arguments], _QUIET)
        super().__init__(
            process, f"http://127.0.0.1:{port}", folder.name, tell=tell, tokenizer=folder, dialect="vllm", **options
        )


def _of_model(folder: Path, adapters: Mapping[str, Path]) -> list[str]:
    from fledge.models.load import base_of, is_adapter

    base, name = folder, folder.name
    if is_adapter(folder):
        base, name, adapters = base_of(folder), base_of(folder).name, {folder.name: folder, **adapters}
    words = ["--model", str(base), "--served-model-name", name]
    if adapters:
        modules = [f"{adapter}={path}" for adapter, path in adapters.items()]
        words += ["--enable-lora", "--max-lora-rank", "256", "--lora-modules", *modules]
    return words
