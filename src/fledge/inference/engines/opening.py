"""An engine other than our own, by its name or address."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t
from fledge.inference.engine import Engine
from fledge.inference.engines.errors import cannot
from fledge.inference.formats import FORMATS

Name = Literal["native", "vllm", "llama.cpp", "openvino", "onnx"]
NAMES: tuple[str, ...] = get_args(Name)


def is_address(text: str) -> bool:
    """Whether a server's address stands where a model or an engine's name may."""
    return text.startswith(("http://", "https://"))


def check_name(engine: str) -> None:
    """Raise FledgeError when `engine` is neither a name nor an address."""
    if engine not in NAMES and not is_address(engine):
        allowed = f"{listing(NAMES)}, http://…"
        raise FledgeError(
            Problem(t("there is no such engine"), "engine", engine, allowed, fix=did_you_mean(engine, NAMES))
        )


def check_dtype(engine: str, dtype: str) -> None:
    """Raise FledgeError for weights in a format that `engine` (a name or an address) is not asked to make."""
    if engine != "native" and dtype in FORMATS and (engine, dtype) != ("llama.cpp", "int8"):
        raise cannot(engine, t("weights in {format}", format=dtype), ["native"], "dtype")


def open_other(address: Path | str, engine: str, dtype: str = "auto", device: str = "auto", **options: Any) -> Engine:
    """The engine `engine` on a model folder (llama.cpp: a GGUF file); `address` or `engine` may be a URL.

    With a URL for an engine, a folder beside it lends its tokenizer. Raises FledgeError when it cannot be had."""
    text = str(address)
    if options.get("adapters") and engine != "vllm":
        raise cannot(engine, t("adapters by request"), ["native", "vllm"], "adapters")
    check_dtype(text if is_address(text) else engine, dtype)
    if is_address(engine) or is_address(text):
        from fledge.inference.engines.remote import RemoteEngine

        if is_address(engine) and not is_address(text):
            return RemoteEngine(engine, tokenizer=address, **options)
        url, _, model = text.partition("#")
        return RemoteEngine(url, model, **options)
    check_name(engine)
    if engine == "vllm":
        from fledge.inference.engines.vllm import VLLM

        return VLLM(address, dtype=dtype, **options)
    if engine == "llama.cpp":
        from fledge.inference.engines.llama_cpp import LlamaCpp

        return LlamaCpp(address, **options)
    if engine == "onnx":
        from fledge.inference.engines.onnx import OnnxEngine

        return OnnxEngine(address, **options)
    if engine == "openvino":
        from fledge.inference.engines.openvino import OpenVinoEngine

        device = "CPU" if device in ("auto", "cpu") else device.upper()
        return OpenVinoEngine(address, device=device, dtype="float32" if dtype == "auto" else dtype, **options)
    from fledge.inference.opening import open_engine

    return open_engine(address, dtype, device, **options)
