"""Servers that we start ourselves: what they are started with, when they are ready, why they are not, how they end."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import pytest

from fledge.compression.gguf_cache import gguf_of
from fledge.core.errors import FledgeError
from fledge.inference.engine import Request
from fledge.inference.engines import environments
from fledge.inference.engines.capabilities import probe
from fledge.inference.engines.llama_cpp import LlamaCpp
from fledge.inference.engines.opening import open_other
from fledge.inference.engines.process import DidNotStart, ServerProcess, free_port
from fledge.inference.engines.vllm import VLLM
from fledge.inference.native import NativeEngine
from fledge.records.kinds import Message
from tests.inference import tiny

SERVER = '''#!{python}
"""A server with the addresses of vLLM or llama.cpp. It is not well for its first moments."""
import json, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

begun, owner, args = time.monotonic(), {owner!r}, sys.argv[1:]
print("arguments", json.dumps(args), flush=True)
if "--break" in args:
    print("Traceback: there is no such number format", flush=True)
    sys.exit(3)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        ready = time.monotonic() - begun > 0.3
        card = {{"id": {model!r}, "owned_by": owner, "max_model_len": 64}}
        self.say({{"data": [card], "arguments": args}}, 200 if ready or self.path != "/health" else 503)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.say({{"choices": [{{"index": 0, "message": {{"content": "I am here"}}, "finish_reason": "stop"}}]}})

    def say(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


HTTPServer(("127.0.0.1", int(args[args.index("--port") + 1])), Handler).serve_forever()
'''


def program(folder: Path, owner: str, model: str) -> Path:
    file = folder / owner
    file.write_text(SERVER.format(python=sys.executable, owner=owner, model=model), encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_vllm_is_started_waited_for_and_stopped(tmp_path: Path, folder: Path) -> None:
    told: list[str] = []
    with VLLM(
        folder, python=program(tmp_path, "vllm", folder.name), dtype="float32", context=64,
        adapters={"kind": tmp_path}, tell=told.append,
    ) as engine:  # fmt: skip
        args = engine._http.ask("GET", "models")["arguments"]
        assert args[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
        for flag, value in {
            "--model": str(folder), "--served-model-name": folder.name, "--host": "127.0.0.1", "--dtype": "float32",
            "--max-model-len": "64", "--generation-config": "vllm", "--lora-modules": f"kind={tmp_path}",
        }.items():  # fmt: skip
            assert args[args.index(flag) + 1] == value
        assert (engine.name, engine.model, engine.context) == ("vllm", folder.name, 64)
        assert engine.generate([Request(messages=(Message("user", "hi"),))])[0].text == "I am here"
        assert engine.decode(engine.encode("你好")) == "你好"  # the folder's own tokenizer
        pid, log = engine.process.pid, engine.process.log
        assert not gone(pid)
    assert gone(pid) and not log.exists() and told[-1] == ""


def test_a_server_that_does_not_start_says_why(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DidNotStart, match=r"exit status 3(.|\n)*no such number format"):
        VLLM(folder, python=program(tmp_path, "vllm", "m"), arguments=["--break"])
    with pytest.raises(DidNotStart, match=r"No such file"):
        VLLM(folder, python=tmp_path / "nothing")


def test_one_that_is_never_ready_is_stopped() -> None:
    process = ServerProcess("slow", [sys.executable, "-c", "import time; print('waiting', flush=True); time.sleep(60)"])
    told: list[str] = []
    with pytest.raises(DidNotStart, match=r"(.|\n)*2 s(.|\n)*waiting"):
        process.wait(lambda: False, seconds=2.2, tell=told.append)
    assert gone(process.pid) and "slow is starting, 2 s: waiting" in told


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    process = ServerProcess("parent", [sys.executable, "-c", code])
    process.wait(lambda: child.exists() and bool(child.read_text()))
    process.stop()
    end = time.monotonic() + 5
    while not (gone(process.pid) and _ended(int(child.read_text()))):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.stop()  # once more is nothing


def _ended(pid: int) -> bool:
    """Gone, or dead and only not yet collected by init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return gone(pid)


def test_llama_cpp_is_started_on_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    _write_gguf(file)
    with LlamaCpp(file, server=program(tmp_path, "llamacpp", "tiny"), parallel=3) as engine:
        args = engine._http.ask("GET", "models")["arguments"]
        assert args[args.index("-m") + 1] == str(file) and args[args.index("-c") + 1] == str(3 * 77)
        assert args[args.index("-np") + 1] == "3" and args[args.index("-ctk") + 1] == "f32"
        assert engine.name == "llama.cpp" and engine.context == 77
        assert engine.generate([Request(messages=(Message("user", "hi"),))])[0].text == "I am here"
    with pytest.raises(FledgeError, match=r"GGUF(.|\n)*fledge export"):
        LlamaCpp(tmp_path)


def _write_gguf(file: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(77)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_what_is_not_here_says_how_to_get_it(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEDGE_ENGINES", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FledgeError, match="fledge engines install vllm"):
        open_other(folder, "vllm")
    file = tmp_path / "tiny.gguf"
    _write_gguf(file)
    with pytest.raises(FledgeError, match=r"fledge engines install llama\.cpp"):
        open_other(file, "llama.cpp")
    assert not environments.present(environments.peers()["vllm"])
    (tmp_path / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "vllm" / "ready").touch()
    assert environments.present(environments.peers()["vllm"])


@pytest.mark.nightly
def test_llama_cpp_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed from its registry (34 MB) and asked: it says what our engine says, and can do what the docs say."""
    monkeypatch.setenv("FLEDGE_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", os.defpath)
    environments.install("llama.cpp")
    folder = tiny.save(tmp_path / "taught", tiny.taught())
    asked = [
        Request(messages=(Message("user", text),), temperature=0, logprobs=0, max_new_tokens=60)
        for text in tiny.TAUGHT
    ]  # fmt: skip
    with NativeEngine.from_folder(folder, "float32", "cpu") as ours, LlamaCpp(gguf_of(folder, "float32")) as llama:
        for here, there in zip(ours.generate(asked), llama.generate(asked), strict=True):
            assert here.text == there.text
            if here.text.isascii():  # halves of characters have no id there, nor has the end of the turn
                found, expected = there.choice.logprobs, here.choice.logprobs
                assert len(expected) - 1 <= len(found) and not any(item.top for item in found)
                for mine, its in zip(expected, found, strict=False):
                    assert its.id == mine.id and its.logprob == pytest.approx(mine.logprob, abs=0.01)
        lacks = {item.name for item in probe(llama) if not item.works}
    assert lacks == {
        "prompt_logprobs", "score", "best_of", "beams", "regex", "grammar", "adapters", "embeddings", "reward"
    }  # fmt: skip


def test_names_and_addresses(folder: Path, url: str) -> None:
    with pytest.raises(FledgeError, match='did you mean "onnx"'):
        open_other(folder, "onx")
    with pytest.raises(FledgeError, match="onnx cannot"):
        open_other(folder, "onnx", adapters={"a": folder})
    attached = open_other(folder, url)
    assert attached.encode("<|im_end|>") != [2]  # the folder's tokenizer reads it as text
    attached.close()
    named = open_other(f"{url}#tiny", "native")
    assert named.context == 256
    named.close()
    assert free_port() != free_port()
