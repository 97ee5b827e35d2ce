"""Using a model: `serve`, `chat`, `generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fledge.core.language import t
from fledge.core.store import Store, find_model


def serve_model(model: str, host: str, port: int, dtype: str, name: str) -> None:
    """`fledge serve`."""
    path = find_model(model, Store())
    from fledge.serving.run import serve
    from fledge.studio.chat import mount

    serve(path, name or _title(model, path), host=host, port=port, dtype=dtype, mount=mount)


def chat_with(model: str, system: str, temperature: float, max_tokens: int) -> None:
    """`fledge chat`."""
    engine = _engine(model, "auto")
    from fledge.serving.terminal import chat

    chat(engine, system=system, temperature=temperature, max_new_tokens=max_tokens)


def generate_batch(model: str, dtype: str) -> None:
    """`fledge generate`."""
    engine = _engine(model, dtype)
    from fledge.inference.batch import generate_file

    failed = generate_file(engine, sys.stdin, sys.stdout)
    if failed:
        print(t("{count} lines could not be answered; their errors stand in the output", count=failed), file=sys.stderr)
        sys.exit(1)


def _engine(model: str, dtype: str) -> Any:
    path = find_model(model, Store())
    from fledge.inference.native import NativeEngine

    return NativeEngine.from_folder(path, dtype=dtype)


def _title(model: str, path: Path) -> str:
    """What the API calls the model: the run's or folder's name as the user gave it."""
    return model.strip("/").replace("/", ".") if not Path(model).exists() else path.name
