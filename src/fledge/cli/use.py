"""Using a model: `serve`, `chat`, `generate`, `engines`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fledge.cli.tuning import options_for
from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.core.store import Store, find_model


def serve_model(
    model: str, host: str, port: int, dtype: str, name: str, adapters: Sequence[str] = (), engine: str = "native",
    tools: Sequence[str] = (), tuning: Mapping[str, Any] = MappingProxyType({}),
) -> None:  # fmt: skip
    """`fledge serve`. `adapters`: NAME=FOLDER each; `engine`: a name or a URL; `tools`: python, search=INDEX;
    `tuning`: what was said of our own engine's options."""
    store = Store()
    path = _place(model, store, engine, dtype)
    options = options_for(path, engine, tuning, store)
    name = name or _title(model, path)
    folders = dict(_named(text, store, name) for text in adapters)
    usable = _tools(tools, store)
    from fledge.serving.run import serve
    from fledge.studio.chat import mount

    serve(
        path, name, host=host, port=port, dtype=dtype, mount=mount, adapters=folders, engine=engine, tools=usable,
        options=options,
    )  # fmt: skip


def _named(text: str, store: Store, taken: str) -> tuple[str, Path]:
    """The two halves of NAME=FOLDER; the folder may be RUN/STAGE too."""
    name, equals, folder = text.partition("=")
    if not equals or not name or not folder or name == taken:
        raise FledgeError(
            Problem(
                t("an adapter needs a name of its own"),
                "--adapter",
                found=text,
                allowed=t("NAME=FOLDER, not {name}=…", name=taken),
            )
        )
    return name, find_model(folder, store, prefer=("adapter",))


def _tools(names: Sequence[str], store: Store) -> dict[str, Any]:
    """The tools that the techniques of clients may use; the calculator always. Raises FledgeError."""
    from fledge.core.sandbox import refuse_unless_confined
    from fledge.inference.prompting.tools import Search, built_in

    allowed = {"calculator": built_in()["calculator"]}
    for text in names:
        name, _, index = text.partition("=")
        if text == "python":
            refuse_unless_confined()
            allowed["python"] = built_in()["python"]
        elif name == "search" and index:
            from fledge.cli.ask import find_index
            from fledge.inference.retrieval.retriever import Retriever

            allowed["search"] = Search(Retriever.open(find_index(index, store)))
        elif text != "calculator":
            what = t('there is no tool "{name}" here', name=text)
            raise FledgeError(Problem(what, "--tool", allowed="calculator, python, search=INDEX"))
    return allowed


def chat_with(
    model: str, system: str, temperature: float, max_tokens: int, engine: str = "native",
    tuning: Mapping[str, Any] = MappingProxyType({}), index: str = "", embedder: str = "",
) -> None:  # fmt: skip
    """`fledge chat`. `index`: what each message is searched in, with the vectors of the model `embedder`."""
    from fledge.cli.ask import retriever_of

    search = retriever_of(index, embedder) if index else None
    opened = _engine(model, "auto", engine, tuning)
    from fledge.serving.terminal import chat

    chat(opened, system=system, temperature=temperature, max_new_tokens=max_tokens, search=search)


def generate_batch(
    model: str, dtype: str, engine: str = "native", tuning: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """`fledge generate`."""
    opened = _engine(model, dtype, engine, tuning)
    from fledge.inference.batch import generate_file

    failed = generate_file(opened, sys.stdin, sys.stdout)
    if failed:
        print(t("{count} lines could not be answered; their errors stand in the output", count=failed), file=sys.stderr)
        sys.exit(1)


def _engine(model: str, dtype: str, engine: str, tuning: Mapping[str, Any] = MappingProxyType({})) -> Any:
    store = Store()
    place = _place(model, store, engine, dtype)
    options = options_for(place, engine, tuning, store)
    from fledge.inference.opening import open_engine

    return open_engine(place, dtype=dtype, engine=engine, **options)


def _place(model: str, store: Store, engine: str, dtype: str) -> Path | str:
    """Where the engine finds the model: a server's address as it is, a folder, for llama.cpp a GGUF file.

    The name of a model at `engine`'s URL may stand for a folder: then there is no tokenizer of ours."""
    from fledge.inference.engines.opening import check_dtype, check_name, is_address

    check_name(engine)
    check_dtype(engine, dtype)
    if is_address(model):
        return model
    if engine == "llama.cpp" and model.endswith(".gguf"):
        return Path(model)
    path = find_model(model, store)
    if engine != "llama.cpp":
        return path
    from fledge.compression.gguf_cache import gguf_of
    from fledge.inference.engines.process import progress

    return gguf_of(path, dtype, progress)


def show_engines(target: str, engine: str, dtype: str, adapters: Sequence[str], as_json: bool) -> None:
    """`fledge engines`: what there is on this machine, or what one engine can do."""
    from fledge.cli.engines import show_matrix, show_present

    if not target:
        return show_present(as_json)
    store = Store()
    folders = dict(_named(text, store, "") for text in adapters)
    place = _place(target, store, engine, dtype)
    from fledge.inference.opening import open_engine

    opened = open_engine(place, dtype=dtype, engine=engine, adapters=folders or None)
    try:
        show_matrix(opened, engine if engine != "native" else str(getattr(opened, "name", "native")), folders, as_json)
    finally:
        opened.close()


def install_engine(name: str) -> None:
    """`fledge engines install NAME`."""
    from fledge.inference.engines.environments import install

    print(t("{engine} is ready: {path}", engine=name, path=install(name)))


def _title(model: str, path: Path | str) -> str:
    """What the API calls the model: the run's or folder's name as the user gave it; of a URL, what it says itself."""
    if isinstance(path, str):
        return ""
    return Path(model).resolve().name if Path(model).exists() else model.strip("/").replace("/", ".")
