"""`fledge engines`: what is here, what it can do, how one that needs an environment of its own gets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fledge.cli.main import cli
from fledge.core.errors import FledgeError
from fledge.inference.engines import environments


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where environments lie in these tests: nowhere yet."""
    monkeypatch.setenv("FLEDGE_ENGINES", str(tmp_path / "engines"))
    return tmp_path / "engines"


def call(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["engines", *arguments], catch_exceptions=False, standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout


def wheel(folder: Path, name: str, needs: str = "") -> Path:
    """A package of one empty module."""
    file, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    more = f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr(f"{name}.py", "")
        packed.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{more}")
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
    return file


def imports(python: Path, module: str) -> bool:
    return subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode == 0


def test_an_environment_is_made_and_one_that_fails_is_not_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`install` for real, with packages that lie here."""
    unwanted = wheel(tmp_path, "unwanted")
    wanted = wheel(tmp_path, "wanted", f"unwanted @ {unwanted.as_uri()}")
    peer = environments.Peer("vllm", "", (str(wanted),), ("unwanted",), module="wanted")
    monkeypatch.setattr(environments, "peers", lambda: {"vllm": peer})
    python = home / "vllm" / "bin" / "python"
    assert not environments.present(peer)
    assert environments.install("vllm") == python
    assert environments.present(peer)
    assert imports(python, "wanted") and not imports(python, "unwanted")
    home.rename(tmp_path / "moved")
    home.touch()  # no folder can be made below a file
    with pytest.raises(FledgeError, match=rf"{home / 'vllm'}(.|\n)*could not be made(.|\n)*-m venv"):
        environments.install("vllm")
    assert environments.python_of("vllm") is None and not environments.present(peer)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lama.cpp"], r'did you mean "llama\.cpp"'),
        (["onnx"], r"pip install 'fledge-llm\[onnx\]'"),
        (["Ollama"], "--engine http://"),
        ([], r"allowed: vllm, llama\.cpp"),
        (["vllm", "onnx"], "found: vllm onnx"),
    ],
)
def test_what_has_no_environment(words: list[str], says: str) -> None:
    with pytest.raises(FledgeError, match=says):
        call("install", *words)


def test_what_is_here_and_what_it_can_do(folder: Path) -> None:
    assert "fledge engines install vllm" in " ".join(call().split())
    llama = shutil.which("llama-server") is not None
    here = {"native": True, "vllm": False, "llama.cpp": llama, "openvino": True, "onnx": True}
    assert json.loads(call("--json")) == here
    works = json.loads(call(str(folder), "--json"))
    assert works.pop("reward") is False and works.pop("adapters") is None and all(works.values())
    assert "adapters ? name one: --adapter NAME=FOLDER" in " ".join(call(str(folder)).split())
    with pytest.raises(click.UsageError, match="one model at a time"):
        call(str(folder), str(folder))
