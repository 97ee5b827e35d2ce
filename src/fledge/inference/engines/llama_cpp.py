"""llama.cpp's server on a GGUF file.

    engine = LlamaCpp("model.gguf")

`llama-server` is taken from the PATH; else the same server out of the package `xllamacpp`, from the environment that
`fledge engines install llama.cpp` makes. Its chat template is the one in the file. Keys and
values of a file in fp32 are kept in fp32, of others in 16 bits. It names tokens by id with log-probabilities
only, and there no halves of characters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.inference.engines.environments import missing, python_of
from fledge.inference.engines.process import ServerProcess, Tell, free_port
from fledge.inference.engines.started import StartedEngine

_DEFAULT_CONTEXT = 4096


class LlamaCpp(StartedEngine):
    """An `Engine` over a llama.cpp server."""

    def __init__(
        self,
        file: Path | str,
        *,
        server: Path | str | None = None,
        context: int | None = None,
        parallel: int = 8,
        arguments: Sequence[str] = (),
        tell: Tell | None = None,
        **options: Any,
    ) -> None:
        """`server`: the program; `context`: tokens of one answer with its prompt (the file's, at most 4,096);
        `parallel`: answers at once; `arguments`: more of its own flags; `options`: `RemoteEngine`'s.

        Raises FledgeError when the program or the file is not there, or it does not start (with the end of its log)."""
        file = Path(file)
        if file.suffix != ".gguf" or not file.is_file():
            fix = t("export the model first: fledge export --model …")
            raise FledgeError(Problem(t("llama.cpp reads GGUF files"), found=str(file), fix=fix))
        made_for, exact = _read(file)
        each, port, threads = context or min(made_for, _DEFAULT_CONTEXT), free_port(), len(os.sched_getaffinity(0))
        cache = "f32" if exact else "f16"
        if program := server or shutil.which("llama-server"):
            command = [program, "-m", file, "--host", "127.0.0.1", "--port", port, "--jinja"]
            command += ["-c", each * parallel, "-np", parallel, "-t", threads, "-ctk", cache, "-ctv", cache, *arguments]
        elif python := python_of("llama.cpp"):
            command = [python, Path(__file__).with_name("llama_launch.py"), file, port, each, parallel, threads, cache]
        else:
            raise missing("llama.cpp")
        process = ServerProcess("llama.cpp", [str(word) for word in command])
        url = f"http://127.0.0.1:{port}"
        super().__init__(process, url, tell=tell, context=each, dialect="llama.cpp", concurrency=parallel, **options)


def _read(file: Path) -> tuple[int, bool]:
    """The context that a GGUF file was made for, and whether all its weights are in fp32."""
    from gguf import GGUFReader, LlamaFileType

    context, kind = _DEFAULT_CONTEXT, None
    for name, value in GGUFReader(file).fields.items():
        if name.endswith(".context_length"):
            context = int(value.contents())
        elif name == "general.file_type":
            kind = int(value.contents())
    return context, kind == LlamaFileType.ALL_F32
